//! What the published study found, held against this model.

use kernels::mx::{ElementType, ScaleRounding};
use serde::Serialize;

use super::Study;
use super::design::{Design, Organisation, Symmetry};
use super::measure::Operand;

/// Whether a finding holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// On everything that was measured.
    Holds,
    /// On one of weights and activations.
    Partly,
    /// This model differs.
    Differs,
    /// It is about activations, and there was no text.
    NotMeasured,
}

impl Verdict {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Partly => "holds in part",
            Self::Differs => "differs",
            Self::NotMeasured => "not measured",
        }
    }

    /// Of one answer for each operand.
    fn of(answers: &[bool]) -> Self {
        match answers.iter().filter(|&&holds| holds).count() {
            _ if answers.is_empty() => Self::NotMeasured,
            0 => Self::Differs,
            count if count == answers.len() => Self::Holds,
            _ => Self::Partly,
        }
    }
}

/// A published finding and what this model says to it.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The finding.
    pub claim: String,
    /// Whether it holds here.
    pub verdict: Verdict,
    /// The figures behind the verdict.
    pub figures: String,
}

/// Rules that look at the largest magnitude alone.
pub(super) const SIMPLE_RULES: [ScaleRounding; 4] =
    [ScaleRounding::Floor, ScaleRounding::Ceil, ScaleRounding::Rceil, ScaleRounding::Even];

/// The 4-bit types.
pub(super) const FOUR_BITS: [ElementType; 3] = [ElementType::E2m1, ElementType::E3m0, ElementType::Int4];

/// Differences below this are a tie, in dB.
const TIE_DB: f64 = 0.05;

/// All findings, in the order of the published study.
pub(super) fn findings(study: &Study) -> Vec<Finding> {
    let ceil_note = "An integer's range is a matter of convention: where INT4 is n/4 with |n| <= 7, as here, ceil \
                     leaves the top half of the codes unused, and what a convention of one binade less calls ceil is \
                     floor here.";
    vec![
        best_rule(study, ElementType::E2m1, ScaleRounding::Even, ""),
        best_rule(study, ElementType::E3m0, ScaleRounding::Ceil, ""),
        best_rule(study, ElementType::Int4, ScaleRounding::Ceil, ceil_note),
        most_from(
            study,
            "INT4 gains most of the 4-bit types from asymmetric scales",
            "two scales against one, blocks of 32",
            |study, operand, element| {
                let symmetric = best(study, operand, &Design::ocp(element))?;
                let two = Design { symmetry: Symmetry::TwoScales, ..Design::ocp(element) };
                Some(best(study, operand, &two)? - symmetric)
            },
        ),
        most_from(
            study,
            "INT4 gains most of the 4-bit types from small blocks",
            "blocks of 8 against 128",
            |study, operand, element| {
                let large = best(study, operand, &Design { block: 128, ..Design::ocp(element) })?;
                Some(best(study, operand, &Design { block: 8, ..Design::ocp(element) })? - large)
            },
        ),
        columns(study),
    ]
}

/// The best SQNR that any simple rule gives `design`.
fn best(study: &Study, operand: Operand, design: &Design) -> Option<f64> {
    let ratios = SIMPLE_RULES
        .iter()
        .filter_map(|&scale_rounding| study.sqnr_db(operand, &Design { scale_rounding, ..*design }));
    ratios.reduce(f64::max)
}

const fn name(operand: Operand) -> &'static str {
    match operand {
        Operand::Weight => "weights",
        Operand::Activation => "activations",
    }
}

/// `rule` is the best of the simple ones for `element`.
fn best_rule(study: &Study, element: ElementType, rule: ScaleRounding, note: &str) -> Finding {
    let (mut answers, mut figures) = (Vec::new(), Vec::new());
    for operand in study.operands() {
        let of = |rule| study.sqnr_db(operand, &Design { scale_rounding: rule, ..Design::ocp(element) });
        let (Some(own), Some(best)) = (of(rule), best(study, operand, &Design::ocp(element))) else {
            continue;
        };
        answers.push(own > best - TIE_DB);
        let each = SIMPLE_RULES.iter().filter_map(|&rule| Some(format!("{rule} {:.2}", of(rule)?)));
        figures.push(format!("{}: {} dB", name(operand), each.collect::<Vec<_>>().join(", ")));
    }
    let verdict = Verdict::of(&answers);
    let note = if verdict == Verdict::Holds || note.is_empty() { String::new() } else { format!(". {note}") };
    Finding {
        claim: format!("{rule} is the best scale rule for {}", short(element)),
        verdict,
        figures: figures.join("; ") + &note,
    }
}

/// INT4 has the largest `gain` of the 4-bit types.
fn most_from(
    study: &Study,
    claim: &str,
    what: &str,
    gain: impl Fn(&Study, Operand, ElementType) -> Option<f64>,
) -> Finding {
    let (mut answers, mut figures) = (Vec::new(), Vec::new());
    for operand in study.operands() {
        let gains = FOUR_BITS.map(|element| gain(study, operand, element).unwrap_or(f64::NAN));
        let [e2m1, e3m0, int4] = gains;
        answers.push(int4 > e2m1.max(e3m0));
        figures.push(format!("{}: E2M1 {e2m1:+.2}, E3M0 {e3m0:+.2}, INT4 {int4:+.2} dB", name(operand)));
    }
    let figures = format!("{what}, best rule each: {}", figures.join("; "));
    Finding { claim: claim.to_owned(), verdict: Verdict::of(&answers), figures }
}

/// Scales along columns help activations, and do not help weights.
fn columns(study: &Study) -> Finding {
    let gain = |operand, element| {
        let column = Design { organisation: Organisation::Column, ..Design::ocp(element) };
        Some(best(study, operand, &column)? - best(study, operand, &Design::ocp(element))?)
    };
    let mut figures = Vec::new();
    let mut mean = |operand| {
        let gains = FOUR_BITS.map(|element| gain(operand, element));
        let [Some(e2m1), Some(e3m0), Some(int4)] = gains else { return None };
        figures.push(format!("{}: E2M1 {e2m1:+.2}, E3M0 {e3m0:+.2}, INT4 {int4:+.2} dB", name(operand)));
        Some((e2m1 + e3m0 + int4) / 3.0)
    };
    // A gain that nobody would store another layout for is none.
    const NOTABLE_DB: f64 = 0.3;
    let weights = mean(Operand::Weight).map(|gain| gain < NOTABLE_DB);
    let activations = mean(Operand::Activation).map(|gain| gain >= NOTABLE_DB);
    let verdict = match (weights, activations) {
        (Some(weights), Some(activations)) => Verdict::of(&[weights, activations]),
        _ => Verdict::NotMeasured,
    };
    Finding {
        claim: "scales along columns (kx1) help activations only".to_owned(),
        verdict,
        figures: format!("kx1 against 1xk, blocks of 32, best rule each: {}", figures.join("; ")),
    }
}

/// `E2M1`.
pub(super) fn short(element: ElementType) -> String {
    let spec = element.spec();
    if spec.is_integer() {
        format!("INT{}", spec.bits)
    } else {
        format!("E{}M{}", spec.exponent_bits, spec.mantissa_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_counts_the_operands() {
        assert_eq!(Verdict::of(&[true, true]), Verdict::Holds);
        assert_eq!(Verdict::of(&[true, false]), Verdict::Partly);
        assert_eq!(Verdict::of(&[false]), Verdict::Differs);
        assert_eq!(Verdict::of(&[]), Verdict::NotMeasured);
    }

    #[test]
    fn elements_have_short_names() {
        let names = ElementType::ALL.map(short);
        assert_eq!(names, ["INT8", "E4M3", "E5M2", "E2M3", "E3M2", "E2M1", "INT4", "E3M0"]);
    }
}
