//! The values of the flags of calibrated quantization.

use std::path::PathBuf;

use clap::ValueEnum;
use converter::quantize::CalibratedMethod;

/// `--method`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Method {
    /// Direct cast.
    Nearest,
    /// Errors spread to the weights that make up for them best.
    Gptq,
    /// Each weight makes up for all errors before it.
    ErrorDiffusion,
}

/// The method that needs calibration; `None` for direct cast.
pub(super) fn method(asked: Option<Method>, text: Option<&PathBuf>) -> Option<CalibratedMethod> {
    match (asked, text) {
        (Some(Method::Nearest), _) | (None, None) => None,
        (Some(Method::ErrorDiffusion), _) => Some(CalibratedMethod::ErrorDiffusion),
        (Some(Method::Gptq), _) | (None, Some(_)) => Some(CalibratedMethod::Gptq),
    }
}

/// From 0 to 1.
pub(super) fn share(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "a number is expected".to_owned())?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err("not from 0 to 1".to_owned()) }
}
