//! Rotary position embedding: the frequencies, and the ways checkpoints stretch them.
//!
//! The definitions are those of `modeling_rope_utils.py` in Hugging Face Transformers.

use std::f64::consts::PI;

use crate::ConfigError;
use crate::fields::Fields;

/// Frequencies of the rotation, computed once from the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians per position, one for each of the `head_dim / 2` pairs.
    pub inv_freq: Vec<f32>,
    /// Multiplies cosines and sines (YaRN's attention factor; 1 otherwise).
    pub factor: f32,
    /// Positions that the model is made for, stretching included.
    pub max_positions: usize,
}

impl Rope {
    /// Reads `rope_theta` and `rope_scaling` (Transformers 4) or `rope_parameters` (Transformers 5).
    pub(crate) fn parse(
        config: &Fields<'_>,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, ConfigError> {
        let scaling = match config.object("rope_scaling")? {
            Some(scaling) => Some(scaling),
            None => config.object("rope_parameters")?,
        };
        let plain = |theta| Self {
            inv_freq: to_f32(&base_frequencies(theta, head_dim)),
            factor: 1.0,
            max_positions: max_position_embeddings,
        };
        let theta = config.positive("rope_theta")?;
        let Some(scaling) = scaling else {
            return Ok(plain(theta.unwrap_or(DEFAULT_THETA)));
        };
        if let Some((layers, _)) = scaling.iter().find(|(_, value)| value.is_object()) {
            return Err(scaling.unsupported(layers, "one set of parameters for all layers"));
        }
        if scaling.positive("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
            return Err(scaling.unsupported("partial_rotary_factor", "1"));
        }
        let theta = scaling.positive("rope_theta")?.or(theta).unwrap_or(DEFAULT_THETA);
        let kind_field = if scaling.value("rope_type").is_some() { "rope_type" } else { "type" };
        let original = || {
            let outer = config.size("original_max_position_embeddings")?;
            let inner = scaling.size("original_max_position_embeddings")?;
            Ok(outer.or(inner).unwrap_or(max_position_embeddings))
        };
        let stretched = Stretch { scaling: &scaling, theta, head_dim };
        match scaling.text(kind_field)?.unwrap_or("default") {
            // NTK stretching by the current length begins beyond max_position_embeddings, where no context goes.
            "default" | "dynamic" => Ok(plain(theta)),
            "linear" => {
                let factor = stretched.required("factor")?;
                let inv_freq: Vec<f64> = stretched.base().iter().map(|f| f / factor).collect();
                Ok(Self { inv_freq: to_f32(&inv_freq), ..plain(theta) })
            }
            "llama3" => {
                let inv_freq = stretched.llama3(original()?)?;
                Ok(Self { inv_freq: to_f32(&inv_freq), ..plain(theta) })
            }
            "yarn" => stretched.yarn(original()?, max_position_embeddings),
            _ => Err(scaling.unsupported(kind_field, "default, linear, dynamic, llama3, yarn")),
        }
    }
}

/// `rope_theta` where the configuration has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// `theta^(-2i / head_dim)` for each pair `i`.
fn base_frequencies(theta: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|pair| theta.powf(-((2 * pair) as f64) / head_dim as f64)).collect()
}

fn to_f32(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

/// Parameters of a stretched rotation.
struct Stretch<'a> {
    scaling: &'a Fields<'a>,
    theta: f64,
    head_dim: usize,
}

impl Stretch<'_> {
    fn base(&self) -> Vec<f64> {
        base_frequencies(self.theta, self.head_dim)
    }

    fn required(&self, field: &str) -> Result<f64, ConfigError> {
        let value = self.scaling.positive(field)?;
        self.scaling.require(field, value)
    }

    /// Llama 3.1: long wavelengths are stretched by `factor`, short ones left alone, those between interpolated.
    fn llama3(&self, original: usize) -> Result<Vec<f64>, ConfigError> {
        let factor = self.required("factor")?;
        let low = self.required("low_freq_factor")?;
        let high = self.required("high_freq_factor")?;
        if high <= low {
            return Err(self.scaling.invalid("high_freq_factor", format!("above low_freq_factor = {low}")));
        }
        let stretch = |frequency: f64| {
            let turns = original as f64 * frequency / (2.0 * PI);
            let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - keep) * frequency / factor + keep * frequency
        };
        Ok(self.base().into_iter().map(stretch).collect())
    }

    /// YaRN (arXiv 2309.00071): pairs that turn often in the original context keep their frequency, pairs that turn
    /// rarely are stretched, with a linear ramp between; cosines and sines grow with the logarithm of the factor.
    fn yarn(&self, original: usize, max_position_embeddings: usize) -> Result<Rope, ConfigError> {
        let scaling = self.scaling;
        if self.theta <= 1.0 {
            return Err(scaling.invalid("rope_theta", "above 1"));
        }
        let factor = scaling.positive("factor")?.unwrap_or(max_position_embeddings as f64 / original as f64);
        let ramp = self.yarn_ramp(original)?;
        let inv_freq: Vec<f64> = (self.base().into_iter().zip(ramp))
            .map(|(frequency, stretched)| frequency / factor * stretched + frequency * (1.0 - stretched))
            .collect();
        let extended = (original as f64 * factor) as usize;
        Ok(Rope {
            inv_freq: to_f32(&inv_freq),
            factor: self.yarn_attention_factor(factor)? as f32,
            max_positions: max_position_embeddings.max(extended),
        })
    }

    /// How far each pair is stretched, from 0 (not at all) to 1 (by the whole factor).
    fn yarn_ramp(&self, original: usize) -> Result<Vec<f64>, ConfigError> {
        let dim = self.head_dim as f64;
        let pair_turning =
            |turns: f64| dim * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let beta = |field, default| {
            let value = self.scaling.non_negative(field)?;
            Ok::<f64, ConfigError>(value.filter(|&beta| beta > 0.0).unwrap_or(default))
        };
        let (mut low, mut high) =
            (pair_turning(beta("beta_fast", 32.0)?), pair_turning(beta("beta_slow", 1.0)?));
        if self.scaling.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001; // as Transformers does, to divide by something
        }
        Ok((0..self.head_dim / 2).map(|pair| ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0)).collect())
    }

    fn yarn_attention_factor(&self, factor: f64) -> Result<f64, ConfigError> {
        if let Some(given) = self.scaling.positive("attention_factor")? {
            return Ok(given);
        }
        let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let given = |field| Ok(self.scaling.non_negative(field)?.filter(|&scale| scale > 0.0));
        Ok(match (given("mscale")?, given("mscale_all_dim")?) {
            (Some(scale), Some(all_dim)) => mscale(scale) / mscale(all_dim),
            _ => mscale(1.0),
        })
    }
}

#[cfg(test)]
mod tests;
