//! Groups of modules that get one format, and the choice of one for each.

use kernels::mx::MxFormat;

use super::MixError;
use super::knapsack::{Choice, least_cost};

/// Modules that have one format, as loaders fuse them, and what each format costs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Group {
    /// The modules.
    pub(crate) modules: Vec<String>,
    /// Elements of all of them.
    pub(crate) elements: u64,
    /// By format of the mix: the error of the outputs relative to them, in power.
    pub(crate) errors: Vec<f64>,
    /// What a relative error of 1 would do to the model: Kullback-Leibler divergence per token, in nats. 1 if unknown.
    pub(crate) sensitivity: f64,
}

impl Group {
    /// Bytes of the group in `format`, scales included.
    pub(super) fn bytes(&self, format: MxFormat) -> u64 {
        let block = format.block.size();
        self.elements / block as u64 * (format.code_bytes(block) + format.scale_bytes(block)) as u64
    }

    /// What the format of this index does to the model.
    pub(super) fn cost(&self, format: usize) -> f64 {
        self.sensitivity * self.errors[format]
    }
}

/// Bits per weight of `groups` in `formats`.
pub(super) fn bits_per_weight(groups: &[Group], formats: &[MxFormat]) -> f64 {
    let bytes: u64 = groups.iter().zip(formats).map(|(group, format)| group.bytes(*format)).sum();
    8.0 * bytes as f64 / elements(groups).max(1) as f64
}

fn elements(groups: &[Group]) -> u64 {
    groups.iter().map(|group| group.elements).sum()
}

/// The format of each group: the least sum of costs within `bits` per weight.
///
/// # Errors
/// No mix is within the budget.
pub(super) fn choose(groups: &[Group], formats: &[MxFormat], bits: f64) -> Result<Vec<MxFormat>, MixError> {
    let choices: Vec<Vec<Choice>> = groups
        .iter()
        .map(|group| {
            let choice = |(index, format): (usize, &MxFormat)| Choice {
                weight: group.bytes(*format),
                cost: group.cost(index),
            };
            formats.iter().enumerate().map(choice).collect()
        })
        .collect();
    let budget = (bits * elements(groups) as f64 / 8.0).floor() as u64;
    match least_cost(&choices, budget) {
        Some(chosen) => Ok(chosen.into_iter().map(|index| formats[index]).collect()),
        None => {
            let smallest = formats.iter().map(|format| bits_per_weight(groups, &vec![*format; groups.len()]));
            Err(MixError::OverBudget { bits, least: smallest.fold(f64::INFINITY, f64::min) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, elements: u64, sensitivity: f64, errors: [f64; 3]) -> Group {
        Group { modules: vec![name.to_owned()], elements, errors: errors.into(), sensitivity }
    }

    #[test]
    fn the_budget_goes_where_errors_cost_most() {
        let formats = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"].map(|name| name.parse().unwrap());
        let names = |groups: &[Group], bits: f64| -> Vec<String> {
            let chosen = choose(groups, &formats, bits).unwrap();
            assert!(bits_per_weight(groups, &chosen) <= bits);
            chosen.iter().map(ToString::to_string).collect()
        };
        let groups = [group("a", 3200, 1.0, [9.0, 1.0, 2.0]), group("b", 3200, 1.0, [3.0, 2.0, 1.0])];
        assert_eq!(names(&groups, 4.25), ["mxfp4", "mxfp4"]);
        assert_eq!(names(&groups, 5.25), ["mxfp6_e2m3", "mxfp4"]);
        assert_eq!(names(&groups, 6.25), ["mxfp6_e2m3", "mxfp6_e3m2"]);
        let sensitive = [groups[0].clone(), Group { sensitivity: 10.0, ..groups[1].clone() }];
        assert_eq!(names(&sensitive, 5.25), ["mxfp4", "mxfp6_e3m2"]);
        let error = choose(&groups, &formats, 4.2).unwrap_err();
        assert!(error.to_string().contains("4.250 bits"), "{error}");
    }
}
