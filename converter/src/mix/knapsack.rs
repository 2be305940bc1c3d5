//! The multiple-choice knapsack problem, solved exactly.

/// One of the options of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    /// What counts against the budget.
    pub(super) weight: u64,
    /// What is to become small.
    pub(super) cost: f64,
}

/// A partial choice that no other one beats in both weight and cost.
#[derive(Debug, Clone, Copy)]
struct Entry {
    sum: Choice,
    /// Index of the entry that it extends, among those of the groups before.
    previous: usize,
    option: usize,
}

/// The index of one option of each group, such that the weights sum to at most `budget` and the costs to the least that
/// is possible then; `None` if every choice is too heavy.
///
/// Groups are added one by one to the list of all choices that are not beaten. The list is never longer than there are
/// different sums of weights: a few thousand, as the sizes of a model's matrices have a large common divisor.
pub(super) fn least_cost(groups: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let lightest = |options: &[Choice]| options.iter().map(|option| option.weight).min();
    // The lightest that is still to come.
    let mut rest: u64 = groups.iter().filter_map(|options| lightest(options)).sum();
    if rest > budget {
        return None;
    }
    let start = [Entry { sum: Choice { weight: 0, cost: 0.0 }, previous: 0, option: 0 }];
    let mut stages: Vec<Vec<Entry>> = Vec::with_capacity(groups.len());
    for options in groups {
        rest -= lightest(options)?;
        let front = stages.last().map_or(&start[..], Vec::as_slice);
        let mut extended = Vec::with_capacity(front.len() * options.len());
        for (previous, entry) in front.iter().enumerate() {
            for (option, choice) in options.iter().enumerate() {
                let weight = entry.sum.weight + choice.weight;
                if weight + rest <= budget {
                    let sum = Choice { weight, cost: entry.sum.cost + choice.cost };
                    extended.push(Entry { sum, previous, option });
                }
            }
        }
        extended.sort_by(|a, b| a.sum.weight.cmp(&b.sum.weight).then(a.sum.cost.total_cmp(&b.sum.cost)));
        let mut least = f64::INFINITY;
        extended.retain(|entry| {
            let better = entry.sum.cost < least;
            least = least.min(entry.sum.cost);
            better
        });
        stages.push(extended);
    }
    // The heaviest that is not beaten costs least.
    let mut at = stages.last().map_or(0, Vec::len).saturating_sub(1);
    let backwards = stages.iter().rev().map(|entries| {
        let entry = entries.get(at)?;
        at = entry.previous;
        Some(entry.option)
    });
    let mut chosen = backwards.collect::<Option<Vec<_>>>()?;
    chosen.reverse();
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(groups: &[Vec<Choice>], chosen: &[usize]) -> Choice {
        let picked = groups.iter().zip(chosen).map(|(options, index)| options[*index]);
        picked.fold(Choice { weight: 0, cost: 0.0 }, |sum, option| Choice {
            weight: sum.weight + option.weight,
            cost: sum.cost + option.cost,
        })
    }

    /// Every choice there is.
    fn all(groups: &[Vec<Choice>]) -> Vec<Vec<usize>> {
        groups.iter().fold(vec![Vec::new()], |choices, options| {
            let extend = |choice: &Vec<usize>| -> Vec<Vec<usize>> {
                (0..options.len()).map(|option| [&choice[..], &[option]].concat()).collect()
            };
            choices.iter().flat_map(extend).collect()
        })
    }

    #[test]
    fn as_good_as_trying_everything() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..300 {
            // Costs are whole numbers: their sums are exact in any order.
            let mut option = |_| Choice { weight: random.u64(0..20), cost: f64::from(random.u16(0..1000)) };
            let sizes: Vec<usize> = (0..1 + option(0).weight as usize % 6).collect();
            let groups: Vec<Vec<Choice>> = sizes
                .iter()
                .map(|_| {
                    let count = 1 + option(0).weight as usize % 4;
                    (0..count).map(&mut option).collect()
                })
                .collect();
            let budget = 4 * option(0).weight;
            let feasible = all(&groups).into_iter().map(|choice| sum(&groups, &choice));
            let best = feasible.filter(|sum| sum.weight <= budget).map(|sum| sum.cost).min_by(f64::total_cmp);
            let found = least_cost(&groups, budget).map(|choice| sum(&groups, &choice));
            assert_eq!(found.map(|sum| sum.cost), best, "{groups:?} {budget}");
            assert!(found.is_none_or(|sum| sum.weight <= budget));
        }
    }

    #[test]
    fn nothing_to_choose() {
        assert_eq!(least_cost(&[], 0), Some(Vec::new()));
        assert_eq!(least_cost(&[vec![]], 10), None);
        assert_eq!(least_cost(&[vec![Choice { weight: 11, cost: 0.0 }]], 10), None);
    }
}
