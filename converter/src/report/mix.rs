//! An automatic mix on the page of a conversion: what was asked for, tried and chosen, and why.

use super::chart::{Chart, Series};
use super::html::layer_and_module;
use super::page::{Cell, Page};
use crate::mix::{GroupReport, MixReport, percent};

/// Shows `mix` on `page`.
pub(super) fn show(mix: &MixReport, page: &mut Page) {
    page.heading("The mix");
    page.paragraph(&summary(mix));
    if !mix.trials.is_empty() {
        let rows: Vec<_> = (mix.trials.iter())
            .map(|trial| {
                vec![
                    Cell::new(format!("{:.3}", trial.bits)),
                    Cell::new(format!("{:.4}", trial.perplexity)),
                    Cell::new(format!("{:+.2} %", 100.0 * trial.increase)),
                ]
            })
            .collect();
        let caption = "Mixes tried by direct cast on windows that calibration holds out";
        page.table(caption, &["bits per weight", "perplexity", "increase"], &rows);
    }
    if mix.predicted_divergence.is_some() {
        page.raw(&sensitivity_chart(mix).lines());
    }
    let unit =
        if mix.text.is_some() { "error, dB; divergence, millinats" } else { "error of the weights, dB" };
    let rows: Vec<_> = mix.groups.iter().map(|group| group_row(mix, group)).collect();
    let columns = mix.formats.iter().map(String::as_str);
    let header: Vec<_> = ["group"].into_iter().chain(columns).collect();
    page.table(
        &format!("What each format does to each group ({unit}); the chosen one is marked"),
        &header,
        &rows,
    );
}

/// One sentence or two: `5.00 bits per weight ...`.
pub(super) fn summary(mix: &MixReport) -> String {
    let asked = match (mix.budget, mix.max_perplexity_increase) {
        (Some(bits), _) => format!("at most {bits}"),
        (None, Some(share)) => format!("perplexity raised by {} at most", percent(share)),
        (None, None) => "no limit".to_owned(),
    };
    let counts = mix.formats.iter().filter_map(|format| {
        let count = mix.groups.iter().filter(|group| group.format == *format).count();
        (count > 0).then(|| format!("{count} {format}"))
    });
    let chosen = counts.collect::<Vec<_>>().join(", ");
    let by = match (&mix.text, mix.predicted_divergence) {
        (Some(text), Some(divergence)) => {
            format!("by their effect on {text}, {divergence:.4} nats in all if cast directly")
        }
        _ => "by the error of the weights".to_owned(),
    };
    format!("mix of {:.3} bits per weight ({asked}): groups {chosen}, chosen {by}", mix.bits)
}

fn group_row(mix: &MixReport, group: &GroupReport) -> Vec<Cell> {
    let candidates = group.candidates.iter().zip(&mix.formats).map(|(candidate, format)| {
        let error = candidate.error_db.map_or_else(|| "–".to_owned(), |db| format!("{db:.1}"));
        let text = match candidate.divergence {
            Some(nats) => format!("{error}; {:.3}", 1000.0 * nats),
            None => error,
        };
        Cell::marked(text, *format == group.format)
    });
    std::iter::once(Cell::new(name(group))).chain(candidates).collect()
}

/// `3 q_proj, k_proj, v_proj`.
fn name(group: &GroupReport) -> String {
    let parts: Vec<_> = group.modules.iter().filter_map(|module| layer_and_module(module)).collect();
    let modules: Vec<_> = parts.iter().map(|(_, module)| *module).collect();
    parts
        .first()
        .map_or_else(|| group.modules.join(", "), |(layer, _)| format!("{layer} {}", modules.join(", ")))
}

/// What the roughest format does in each layer, a line for each kind of group.
fn sensitivity_chart(mix: &MixReport) -> Chart<'static> {
    let mut layers: Vec<usize> = Vec::new();
    let mut kinds: Vec<(&str, Vec<(usize, f64)>)> = Vec::new();
    for group in &mix.groups {
        let Some((layer, kind)) = group.modules.first().and_then(|module| layer_and_module(module)) else {
            continue;
        };
        let Some(worst) = group.candidates.iter().filter_map(|c| c.divergence).reduce(f64::max) else {
            continue;
        };
        if layers.last() != Some(&layer) {
            layers.push(layer);
        }
        let index = kinds.iter().position(|(other, _)| *other == kind).unwrap_or_else(|| {
            kinds.push((kind, Vec::new()));
            kinds.len() - 1
        });
        kinds[index].1.push((layer, 1000.0 * worst));
    }
    let series = kinds.into_iter().enumerate().map(|(colour, (kind, values))| Series {
        name: format!("{kind} and what is fused with it"),
        values: layers
            .iter()
            .map(|layer| values.iter().find(|(other, _)| other == layer).map(|(_, value)| *value))
            .collect(),
        colour,
        dash: colour,
    });
    Chart {
        caption: "Divergence of the model's predictions if one group alone is cast to its worst format",
        x_label: "decoder layer",
        unit: "millinats",
        categories: layers.iter().map(usize::to_string).collect(),
        series: series.collect(),
    }
}
