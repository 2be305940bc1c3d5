//! The table that is printed when a model serves: what runs, how, and what it takes.

use std::fmt::Write;

use kernels::mx::Scheme;
use kernels::{Component, KV_BLOCK_TOKENS};

use crate::engine::{EngineInfo, LinearKernel};
use crate::model::ServedModel;
use crate::telemetry::Footprint;

/// The table, with a line feed at its end.
pub(crate) fn table(model: &ServedModel) -> String {
    let info = model.engine.info();
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = describe(&mut out, &model.names[0], info);
    out
}

fn describe(out: &mut String, name: &str, info: &EngineInfo) -> std::fmt::Result {
    writeln!(out, "model    {name}, {} parameters, on {}", count(info.parameters), info.backend)?;
    let header =
        ["layers", "group", "declared", "executed", "kernel", "size", "bits/parameter"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(header).chain(info.linears.iter().map(row)).collect();
    let widths: [usize; 7] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(out, "  {}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    let part =
        |component: Component| format!("{} {}", component.label(), bytes(info.memory.bytes(component)));
    writeln!(out, "memory   {}", Component::ALL.map(part).join(", "))?;
    let footprint = Footprint::of(info);
    write!(out, "weights  {}, {:.2} times less than BF16", bytes(footprint.bytes), footprint.ratio())?;
    match footprint.bits_per_parameter() {
        Some(bits) => writeln!(out, "; {bits:.2} bits per MX parameter")?,
        None => writeln!(out)?,
    }
    writeln!(
        out,
        "kv cache {} tokens ({} blocks of {KV_BLOCK_TOKENS}) in {}, {:.2} bits/element, by {}; \
         sequences of up to {} tokens, {} at a time",
        info.kv_blocks * KV_BLOCK_TOKENS,
        info.kv_blocks,
        info.kv_cache_dtype,
        info.kv_cache_dtype.bits_per_element(),
        info.attention_kernel,
        info.max_model_len,
        info.max_num_seqs,
    )
}

fn row(LinearKernel { linear, kernel }: &LinearKernel) -> [String; 7] {
    let name =
        |scheme: Option<Scheme>| scheme.map_or_else(|| "unquantized".to_owned(), |scheme| scheme.to_string());
    let bits = linear.bytes as f64 * 8.0 / linear.parameters.max(1) as f64;
    [
        linear.layers.to_string(),
        linear.group.clone(),
        name(linear.scheme),
        name(kernel.executed),
        kernel.name.clone(),
        bytes(linear.bytes),
        format!("{bits:.2}"),
    ]
}

/// `134.5 M`.
fn count(n: usize) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} G", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n => format!("{n}"),
    }
}

/// `97.3 MiB`.
fn bytes(n: usize) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kernels::{KvCacheDtype, MemoryAccount};
    use models::LinearInfo;

    use super::*;

    const W4A8: &str = "w4a8";

    #[test]
    fn sizes() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(5 << 30)],
            ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
        );
        assert_eq!([count(999), count(134_515_008), count(7_000_000_000)], ["999", "134.5 M", "7.00 G"]);
    }

    #[test]
    fn every_layer_group_has_its_line() {
        let linear = |group: &str, scheme: Option<&str>| LinearKernel {
            linear: LinearInfo {
                group: group.to_owned(),
                scheme: scheme.map(|name| name.parse().unwrap()),
                layers: 30,
                parameters: 1 << 20,
                bytes: 557_056,
            },
            // A device that computes another scheme than the declared one shows it.
            kernel: kernels::LinearKernel {
                name: "cpu".to_owned(),
                executed: scheme.map(|_| W4A8.parse().unwrap()),
            },
        };
        let info = EngineInfo {
            vocab_size: 10,
            max_model_len: 2048,
            max_num_seqs: 8,
            kv_blocks: 100,
            kv_cache_dtype: KvCacheDtype::Mxfp8,
            scheduling_policy: config::SchedulingPolicy::Fcfs,
            attention_kernel: "cpu_mxfp8".to_owned(),
            backend: "cpu".to_owned(),
            linears: vec![linear("q_proj+k_proj+v_proj", Some("w4a6")), linear("lm_head", None)],
            parameters: 134_515_008,
            memory: Arc::new(MemoryAccount::default()),
            device_memory: None,
        };
        let mut out = String::new();
        describe(&mut out, "m", &info).unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 7);
        assert!(lines[2].contains("mxfp4:mxfp6_e2m3") && lines[2].ends_with("4.25"), "{}", lines[2]);
        assert!(lines[2].contains("mxfp4:mxfp8_e4m3"), "{}", lines[2]);
        assert!(lines[3].contains("lm_head") && lines[3].contains("unquantized"), "{}", lines[3]);
        assert!(lines[6].contains("1600 tokens") && lines[6].contains("2048"), "{}", lines[6]);
        assert!(lines[6].contains("in mxfp8, 8.25 bits/element, by cpu_mxfp8"), "{}", lines[6]);
    }
}
