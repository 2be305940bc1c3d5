//! A conversion as a page: bytes and error by format and by layer, and the chosen mix.

use std::collections::BTreeMap;

use super::chart::{Chart, Series};
use super::page::{Cell, Page};
use super::{Report, TensorReport, Totals, UNQUANTIZED, decibels};
use crate::calibrate::CalibrationReport;
use crate::eval::Evaluation;
use crate::permute::PermutationReport;

impl Report {
    /// The report, in one file that needs nothing else.
    pub fn html(&self) -> String {
        let mut page = Page::new(&format!("{} in {}", self.source, self.format));
        page.paragraph(&format!(
            "{} bytes became {}, {:.2} bits per weight. Layout {}, {:.1} s.{}",
            self.total.bytes_before,
            self.total.bytes_after,
            self.total.bits_per_weight,
            self.layout,
            self.seconds,
            if self.dry_run { " A dry run: nothing was written or measured." } else { "" },
        ));
        for warning in &self.warnings {
            page.paragraph(&format!("Note: {warning}"));
        }
        page.heading("By format");
        let rows: Vec<_> = self.formats.iter().chain([&self.total]).map(totals_row).collect();
        let header = ["format", "tensors", "bytes before", "bytes after", "ratio", "bits/weight", "SQNR, dB"];
        page.table("Bytes before and after, and the error of what was quantized", &header, &rows);
        if let Some(mix) = &self.mix {
            super::mix::show(mix, &mut page);
        }
        if let Some(permutation) = &self.permutation {
            show_permutation(permutation, &mut page);
        }
        if let Some(calibration) = &self.calibration {
            show_calibration(calibration, &mut page);
        }
        if let Some(evaluation) = &self.evaluation {
            show_evaluation(evaluation, &mut page);
        }
        let modules = Modules::of(&self.tensors);
        modules.show(&mut page);
        page.heading("Every tensor");
        let rows: Vec<_> = self.tensors.iter().map(tensor_row).collect();
        let header = ["tensor", "format", "shape", "bytes before", "bytes after", "SQNR, dB"];
        page.table("In the order of the source", &header, &rows);
        page.finish()
    }
}

/// Which channels changed places, and what that did.
fn show_permutation(permutation: &PermutationReport, page: &mut Page) {
    page.heading("Order of channels");
    page.paragraph(&format!("The {}.", permutation.summary()));
    let rows: Vec<_> = (permutation.modules.iter())
        .map(|module| {
            let decibels = [module.stored_db, module.db].map(|db| Cell::new(format!("{db:.2}")));
            [Cell::new(&module.module), Cell::new(module.order)].into_iter().chain(decibels).collect()
        })
        .collect();
    let header = ["module", "ordered by", "stored order, dB", "this order, dB"];
    page.table("Error of direct cast, by the order of the columns", &header, &rows);
}

/// What calibration gained on text that it was not made from.
fn show_calibration(calibration: &CalibrationReport, page: &mut Page) {
    page.heading("Calibration");
    let CalibrationReport {
        method,
        windows,
        window_tokens,
        text,
        held_out,
        perplexity,
        divergence,
        kept,
        ..
    } = calibration;
    let verdict =
        if *kept { "what was written" } else { "no better than direct cast, which was written instead" };
    page.paragraph(&format!(
        "{method} on {windows} windows of {window_tokens} tokens of {text}, in {:.0} s: {verdict}.",
        calibration.seconds
    ));
    let row = |name: &str, perplexity: f64, divergence: Option<f64>| {
        let divergence = divergence.map_or_else(|| "–".to_owned(), |divergence| format!("{divergence:.4}"));
        vec![Cell::new(name), Cell::new(format!("{perplexity:.4}")), Cell::new(divergence)]
    };
    let rows = [
        row("unquantized", perplexity.unquantized, None),
        row("direct cast", perplexity.nearest, Some(divergence.nearest)),
        row("calibrated", perplexity.calibrated, Some(divergence.calibrated)),
    ];
    let header = ["weights", "perplexity", "KL mean, nats"];
    page.table(&format!("On {held_out} other windows"), &header, &rows);
}

/// Perplexities before and after.
fn show_evaluation(evaluation: &Evaluation, page: &mut Page) {
    page.heading("Before and after");
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.4}"));
    let texts = evaluation.models.first().map_or(0, |model| model.texts.len());
    for index in 0..texts {
        let rows: Vec<_> = (evaluation.models.iter())
            .map(|model| {
                let text = &model.texts[index];
                let divergence = text.divergence.as_ref();
                let agreement = divergence.map(|d| format!("{:.1} %", 100.0 * d.top1_agreement));
                vec![
                    Cell::new(&model.checkpoint),
                    Cell::new(&model.format),
                    Cell::new(format!("{:.4}", text.perplexity.perplexity)),
                    Cell::new(number(divergence.map(|d| d.kl_mean))),
                    Cell::new(agreement.unwrap_or_else(|| "–".to_owned())),
                ]
            })
            .collect();
        let text = &evaluation.models[0].texts[index].text;
        let caption = format!(
            "{text}: {} windows of {} tokens; divergence and equal first choices against the source",
            evaluation.windows, evaluation.window_tokens
        );
        page.table(&caption, &["checkpoint", "format", "perplexity", "KL mean, nats", "same top-1"], &rows);
    }
}

fn totals_row(totals: &Totals) -> Vec<Cell> {
    let ratio = totals.bytes_before as f64 / totals.bytes_after.max(1) as f64;
    vec![
        Cell::new(&totals.name),
        Cell::new(totals.tensors.to_string()),
        Cell::new(totals.bytes_before.to_string()),
        Cell::new(totals.bytes_after.to_string()),
        Cell::new(format!("{ratio:.2}")),
        Cell::new(format!("{:.2}", totals.bits_per_weight)),
        Cell::new(decibels(totals.sqnr_db)),
    ]
}

fn tensor_row(tensor: &TensorReport) -> Vec<Cell> {
    let shape: Vec<_> = tensor.shape.iter().map(usize::to_string).collect();
    vec![
        Cell::new(&tensor.name),
        Cell::new(&tensor.scheme),
        Cell::new(shape.join(" x ")),
        Cell::new(tensor.bytes_before.to_string()),
        Cell::new(tensor.bytes_after.to_string()),
        Cell::new(decibels(tensor.sqnr_db)),
    ]
}

/// The quantizable tensors of decoder layers, by layer and module.
struct Modules<'a> {
    layers: BTreeMap<usize, BTreeMap<&'a str, &'a TensorReport>>,
    /// In the order of their first appearance.
    kinds: Vec<&'a str>,
}

impl<'a> Modules<'a> {
    fn of(tensors: &'a [TensorReport]) -> Self {
        let mut modules = Self { layers: BTreeMap::new(), kinds: Vec::new() };
        for tensor in tensors {
            let module = tensor.name.strip_suffix(".weight").filter(|_| tensor.shape.len() == 2);
            let Some((layer, kind)) = module.and_then(layer_and_module) else { continue };
            if !modules.kinds.contains(&kind) {
                modules.kinds.push(kind);
            }
            modules.layers.entry(layer).or_default().insert(kind, tensor);
        }
        modules
    }

    fn show(&self, page: &mut Page) {
        if self.layers.is_empty() {
            return;
        }
        page.heading("By layer");
        let categories: Vec<_> = self.layers.keys().map(usize::to_string).collect();
        let of = |kind: &str, value: &dyn Fn(&TensorReport) -> Option<f64>| -> Vec<Option<f64>> {
            self.layers.values().map(|modules| modules.get(kind).and_then(|tensor| value(tensor))).collect()
        };
        let series = self.kinds.iter().enumerate().map(|(colour, kind)| Series {
            name: (*kind).to_owned(),
            values: of(kind, &|tensor| tensor.sqnr_db),
            colour,
            dash: 0,
        });
        let chart = Chart {
            caption: "Signal to quantization noise ratio of the weights",
            x_label: "decoder layer",
            unit: "dB",
            categories: categories.clone(),
            series: series.collect(),
        };
        page.raw(&chart.lines());
        let megabytes = |bytes: &dyn Fn(&TensorReport) -> u64| -> Vec<Option<f64>> {
            let layers = self.layers.values();
            layers.map(|modules| Some(modules.values().map(|t| bytes(t)).sum::<u64>() as f64 / 1e6)).collect()
        };
        let series = |name: &str, values, colour| Series { name: name.to_owned(), values, colour, dash: 0 };
        let chart = Chart {
            caption: "Bytes of the linear modules, before and after",
            unit: "MB",
            series: vec![
                series("before", megabytes(&|tensor| tensor.bytes_before), 0),
                series("after", megabytes(&|tensor| tensor.bytes_after), 1),
            ],
            ..chart
        };
        page.raw(&chart.bars());
        let rows: Vec<_> = (self.layers.iter())
            .map(|(layer, modules)| {
                let cell = |kind: &&str| {
                    let scheme = modules.get(kind).map_or("–", |tensor| tensor.scheme.as_str());
                    Cell::marked(scheme, scheme != UNQUANTIZED && self.is_rare(kind, scheme))
                };
                std::iter::once(Cell::new(layer.to_string())).chain(self.kinds.iter().map(cell)).collect()
            })
            .collect();
        let header: Vec<_> = std::iter::once("layer").chain(self.kinds.iter().copied()).collect();
        page.table(
            "The format of every module; those that differ from most of their kind are marked",
            &header,
            &rows,
        );
    }

    /// Whether fewer than half of the modules of `kind` have `scheme`.
    fn is_rare(&self, kind: &str, scheme: &str) -> bool {
        let schemes = self.layers.values().filter_map(|modules| modules.get(kind));
        let (same, all) =
            schemes.fold((0, 0), |(same, all), t| (same + usize::from(t.scheme == scheme), all + 1));
        2 * same < all
    }
}

/// Layer number and the last part of the name of `model.layers.3.mlp.down_proj`.
pub(super) fn layer_and_module(module: &str) -> Option<(usize, &str)> {
    let (_, rest) = module.split_once(".layers.")?;
    let (layer, module) = rest.split_once('.')?;
    Some((layer.parse().ok()?, module.rsplit('.').next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_modules_are_read_from_names() {
        assert_eq!(layer_and_module("model.layers.12.mlp.down_proj"), Some((12, "down_proj")));
        assert_eq!(layer_and_module("model.embed_tokens"), None);
        assert_eq!(layer_and_module("model.layers.x.input_layernorm"), None);
    }
}
