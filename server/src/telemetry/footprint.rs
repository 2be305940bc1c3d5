//! The memory footprint: bytes by component and format, and which scheme each layer declares and runs.

use kernels::Component;
use kernels::mx::Scheme;
use prometheus::GaugeVec;

use super::maker::Maker;
use super::process;
use crate::engine::{EngineInfo, LinearKernel};

/// What is shown for a linear layer that is not quantized.
const UNQUANTIZED: &str = "unquantized";

/// The `mx_*` gauges.
pub(super) struct FootprintMetrics {
    memory_bytes: GaugeVec,
    weight_bytes: GaugeVec,
    weight_bits_per_parameter: GaugeVec,
    footprint_ratio: GaugeVec,
    linear_info: GaugeVec,
    attention_info: GaugeVec,
}

impl FootprintMetrics {
    pub(super) fn new(m: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            memory_bytes: m.gauges("mx_memory_bytes", "Memory held, by component.", &["component"])?,
            weight_bytes: m.gauges(
                "mx_weight_bytes",
                "Codes and scales of MX weights, by format.",
                &["format"],
            )?,
            weight_bits_per_parameter: m.gauges(
                "mx_weight_bits_per_parameter",
                "Bits per parameter of the MX weights, scales included.",
                &[],
            )?,
            footprint_ratio: m.gauges(
                "mx_footprint_ratio",
                "Bytes of the whole model in BF16 over the parameter bytes held.",
                &[],
            )?,
            linear_info: m.gauges(
                "mx_linear_info",
                "Which scheme the checkpoint declares, which one runs, and by which kernel.",
                &["layer_group", "declared", "executed", "kernel"],
            )?,
            attention_info: m.gauges(
                "mx_attention_info",
                "How the KV cache is stored, bits per element with scales, and which kernel reads it.",
                &["kv_cache_dtype", "bits_per_element", "kernel"],
            )?,
        })
    }

    pub(super) fn set(&self, info: &EngineInfo) {
        for component in Component::ALL {
            self.memory(component.label(), info.memory.bytes(component));
        }
        let process = process::usage();
        let (used, total) = match info.device_memory {
            Some(memory) => (memory.total_bytes - memory.free_bytes, memory.total_bytes),
            None => (process.resident_bytes, process.machine_bytes),
        };
        self.memory("device_used", used);
        self.memory("device_total", total);

        let footprint = Footprint::of(info);
        self.weight_bytes.reset();
        for LinearKernel { linear, kernel } in &info.linears {
            let name = |scheme: Option<Scheme>| {
                scheme.map_or_else(|| UNQUANTIZED.to_owned(), |scheme| scheme.to_string())
            };
            self.linear_info
                .with_label_values(&[
                    linear.group.as_str(),
                    &name(linear.scheme),
                    &name(kernel.executed),
                    kernel.name.as_str(),
                ])
                .set(1.0);
            if let Some(scheme) = linear.scheme {
                let format = scheme.weight.format.to_string();
                self.weight_bytes.with_label_values(&[format.as_str()]).add(linear.bytes as f64);
            }
        }
        let dtype = info.kv_cache_dtype;
        let bits = dtype.bits_per_element().to_string();
        self.attention_info.with_label_values(&[dtype.name(), &bits, &info.attention_kernel]).set(1.0);
        let no_labels: &[&str] = &[];
        if let Some(bits) = footprint.bits_per_parameter() {
            self.weight_bits_per_parameter.with_label_values(no_labels).set(bits);
        }
        self.footprint_ratio.with_label_values(no_labels).set(footprint.ratio());
    }

    fn memory(&self, component: &str, bytes: usize) {
        self.memory_bytes.with_label_values(&[component]).set(bytes as f64);
    }
}

/// Bytes of a model's parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// Parameters of the whole model.
    pub(crate) parameters: usize,
    /// Bytes of all of them, as held.
    pub(crate) bytes: usize,
    /// Parameters that are MX.
    pub(crate) mx_parameters: usize,
    /// Bytes of those: codes and scales.
    pub(crate) mx_bytes: usize,
}

impl Footprint {
    /// Counts what is held.
    pub(crate) fn of(info: &EngineInfo) -> Self {
        let bytes = |component| info.memory.bytes(component);
        let mx_bytes = bytes(Component::Weights) + bytes(Component::Scales);
        let mx = info.linears.iter().map(|l| &l.linear).filter(|linear| linear.scheme.is_some());
        Self {
            parameters: info.parameters,
            bytes: mx_bytes + bytes(Component::Unquantized),
            mx_parameters: mx.map(|linear| linear.parameters).sum(),
            mx_bytes,
        }
    }

    /// Bits per MX parameter; `None` without any.
    pub(crate) fn bits_per_parameter(self) -> Option<f64> {
        (self.mx_parameters > 0).then(|| self.mx_bytes as f64 * 8.0 / self.mx_parameters as f64)
    }

    /// How many times less than BF16.
    pub(crate) fn ratio(self) -> f64 {
        self.parameters as f64 * 2.0 / self.bytes.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic() {
        let mxfp4 = Footprint { parameters: 3000, bytes: 532 + 4000, mx_parameters: 1000, mx_bytes: 532 };
        assert_eq!(mxfp4.bits_per_parameter(), Some(4.256));
        assert!((mxfp4.ratio() - 6000.0 / 4532.0).abs() < 1e-12);
        let plain = Footprint { parameters: 10, bytes: 20, mx_parameters: 0, mx_bytes: 0 };
        assert_eq!((plain.bits_per_parameter(), plain.ratio()), (None, 1.0));
    }
}
