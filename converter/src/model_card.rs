//! `README.md` of the output.

use std::fmt::Write;

use crate::report::{Report, decibels};

/// A short model card: what it was made from, how, and how much smaller it is.
pub(crate) fn render(report: &Report) -> String {
    let mut card = String::new();
    let source = std::path::Path::new(&report.source);
    let source = source.file_name().unwrap_or_default().to_string_lossy();
    // Writing to a String cannot fail.
    let _ = write!(
        card,
        "---\ntags:\n- mx\n- microscaling\n---\n\
         # {source}, {format}\n\n\
         Made from `{source}` by `mxconvert --format {format}` ({method}, layout `{layout}`). \
         Blocks of 32 elements along K share an E8M0 scale (OCP Microscaling Formats v1.0). \
         Scale rules, per layer, and the SHA-256 of the source are in `mx_conversion.json`.\n\n\
         | format | tensors | bytes before | bytes | bits per weight | SQNR, dB |\n\
         |---|---:|---:|---:|---:|---:|\n",
        format = report.format,
        method = method(report),
        layout = report.layout,
    );
    for totals in report.formats.iter().chain([&report.total]) {
        let _ = writeln!(
            card,
            "| {} | {} | {} | {} | {:.2} | {} |",
            totals.name,
            totals.tensors,
            totals.bytes_before,
            totals.bytes_after,
            totals.bits_per_weight,
            decibels(totals.sqnr_db),
        );
    }
    card
}

fn method(report: &Report) -> String {
    match &report.calibration {
        Some(calibration) if calibration.kept => {
            format!("{}, calibrated on `{}`", calibration.method, calibration.text)
        }
        _ => "direct cast".to_owned(),
    }
}
