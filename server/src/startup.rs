//! The table that is printed when a model serves: what runs, how, and what it takes.

use std::fmt::{self, Write};

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

fn describe(out: &mut String, name: &str, info: &EngineInfo) -> fmt::Result {
    writeln!(out, "model    {name}, {} parameters, on {}", count(info.parameters), info.backend)?;
    layers(out, info)?;
    memory(out, info)?;
    let tokens = info.kv_blocks * KV_BLOCK_TOKENS;
    let whole = tokens / info.max_model_len.max(1);
    writeln!(
        out,
        "limits   {} at a time, of up to {} tokens each; {whole} of that length fit into the KV cache",
        plural(info.max_num_seqs, "sequence"),
        info.max_model_len,
    )
}

/// A line per group of layers: what is declared, what runs.
fn layers(out: &mut String, info: &EngineInfo) -> fmt::Result {
    let header =
        ["layers", "group", "declared", "executed", "kernel", "bits/parameter", "size"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(header).chain(info.linears.iter().map(row)).collect();
    let widths: [usize; 7] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    for row in rows {
        write!(out, " ")?;
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            match column {
                1..=4 => write!(out, "  {cell:width$}")?,
                _ => write!(out, "  {cell:>width$}")?,
            }
        }
        writeln!(out)?;
    }
    if info.linears.iter().any(differs) {
        writeln!(out, "  * not the scheme that the checkpoint declares")?;
    }
    Ok(())
}

/// A line per component, and their sum.
fn memory(out: &mut String, info: &EngineInfo) -> fmt::Result {
    let footprint = Footprint::of(info);
    let bits = footprint.bits_per_parameter().map(|bits| format!("; {bits:.2} bits per MX parameter"));
    let parameters = format!(
        "parameters, all: {}, {:.2} times less than BF16{}",
        bytes(footprint.bytes),
        footprint.ratio(),
        bits.unwrap_or_default()
    );
    let cache = format!(
        "{} tokens: {} blocks of {KV_BLOCK_TOKENS} in {}, {:.2} bits/element, by {}",
        info.kv_blocks * KV_BLOCK_TOKENS,
        info.kv_blocks,
        info.kv_cache_dtype,
        info.kv_cache_dtype.bits_per_element(),
        info.attention_kernel,
    );
    writeln!(out, "memory")?;
    let mut total = 0;
    for component in Component::ALL {
        let held = info.memory.bytes(component);
        if held == 0 && component == Component::Graphs {
            continue;
        }
        total += held;
        let remark = match component {
            Component::Unquantized => parameters.as_str(),
            Component::KvCache => cache.as_str(),
            _ => "",
        };
        let line = format!("  {:<12} {:>10}  {remark}", component.label(), bytes(held));
        writeln!(out, "{}", line.trim_end())?;
    }
    writeln!(out, "  {:<12} {:>10}", "total", bytes(total))
}

/// Whether a device computes another scheme than the declared one.
fn differs(LinearKernel { linear, kernel }: &LinearKernel) -> bool {
    linear.scheme != kernel.executed
}

fn row(layer: &LinearKernel) -> [String; 7] {
    let LinearKernel { linear, kernel } = layer;
    let name =
        |scheme: Option<Scheme>| scheme.map_or_else(|| "unquantized".to_owned(), |scheme| scheme.to_string());
    let bits = linear.bytes as f64 * 8.0 / linear.parameters.max(1) as f64;
    let mark = if differs(layer) { " *" } else { "" };
    [
        linear.layers.to_string(),
        linear.group.clone(),
        name(linear.scheme),
        format!("{}{mark}", name(kernel.executed)),
        kernel.name.clone(),
        format!("{bits:.2}"),
        bytes(linear.bytes),
    ]
}

/// `1 sequence`, `2 sequences`.
fn plural(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
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
            hidden_size: 4,
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
        let line = |start: &str| out.lines().find(|line| line.trim_start().starts_with(start)).unwrap();
        let packed = line("30  q_proj");
        assert!(packed.contains("mxfp4:mxfp6_e2m3  mxfp4:mxfp8_e4m3 *"), "{packed}");
        assert!(packed.contains("4.25") && packed.ends_with("544.0 KiB"), "{packed}");
        let head = line("30  lm_head");
        assert!(head.contains("unquantized") && !head.contains('*'), "{head}");
        assert!(out.contains("* not the scheme that the checkpoint declares"), "{out}");
        let cache = line("kv_cache");
        assert!(
            cache.contains("1600 tokens: 100 blocks of 16 in mxfp8, 8.25 bits/element, by cpu_mxfp8"),
            "{cache}"
        );
        assert_eq!(
            line("limits"),
            "limits   8 sequences at a time, of up to 2048 tokens each; 0 of that length fit into the KV cache"
        );
        for component in Component::ALL.into_iter().filter(|&component| component != Component::Graphs) {
            line(component.label());
        }
        assert!(!out.contains(Component::Graphs.label()), "a CPU records nothing: {out}");
        assert!(line("total").ends_with("0 B"));
    }
}
