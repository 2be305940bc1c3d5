//! The values of the flags that say which formats.

use std::path::{Path, PathBuf};

use converter::mix::{Mix, Target, read_recipe};
use converter::plan::Recipe;
use kernels::mx::{Cast, ElementType, MxFormat, Scheme};
use models::checkpoint::quantization::Dialect;

/// `--format`, or the scheme of a recipe.
#[derive(Debug, Clone)]
pub(super) struct Format {
    /// As it was given.
    pub(super) name: String,
    /// Of a mix: the activation format that all modules have, and a weight format that none keeps.
    pub(super) scheme: Scheme,
    /// `auto`.
    pub(super) is_mix: bool,
}

/// `auto`, `auto:ACTIVATION`, or a scheme.
pub(super) fn format(name: &str) -> Result<Format, String> {
    let scheme = |name: &str| name.parse::<Scheme>().map_err(|e| format!("{e}"));
    let any = Cast::from(MxFormat::new(ElementType::E2m1));
    let (is_mix, scheme) = match name.split_once(':') {
        None if name == "auto" => (true, Scheme { weight: any, activation: None, rotation: None }),
        Some(("auto", activation)) => (true, scheme(&format!("mxfp4:{activation}"))?),
        _ => (false, scheme(name)?),
    };
    Ok(Format { name: name.to_owned(), scheme, is_mix })
}

/// The recipe in a file.
pub(super) fn recipe(path: &str) -> Result<Recipe, String> {
    read_recipe(Path::new(path)).map_err(|e| e.to_string())
}

/// A recipe read from a file, under a name for what it makes.
pub(super) fn named(recipe: &Recipe) -> Format {
    let stem = recipe.file.as_ref().and_then(|file: &PathBuf| file.file_stem());
    let name = stem.map_or_else(|| "recipe".to_owned(), |stem| stem.to_string_lossy().into_owned());
    Format { name, scheme: recipe.scheme, is_mix: false }
}

/// `--bits` or `--max-ppl-increase`.
pub(super) fn target(bits: Option<f64>, max_ppl_increase: Option<f64>) -> Option<Target> {
    bits.map(Target::Bits).or(max_ppl_increase.map(Target::PerplexityIncrease))
}

/// The formats of `--candidates`, each once, or the default ones.
pub(super) fn formats(
    asked: Vec<MxFormat>,
    layout: Option<Dialect>,
    activation: Option<Cast>,
) -> Vec<MxFormat> {
    if asked.is_empty() {
        return Mix::default_formats(layout, activation);
    }
    let mut formats = Vec::new();
    for format in asked {
        if !formats.contains(&format) {
            formats.push(format);
        }
    }
    formats
}

/// A number of bits.
pub(super) fn bits(text: &str) -> Result<f64, String> {
    let bits: f64 = text.parse().map_err(|_| "a number is expected".to_owned())?;
    if bits > 0.0 && bits.is_finite() { Ok(bits) } else { Err("not a number of bits".to_owned()) }
}

/// A share, from `1%` or `1`.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    let percent: f64 = number.parse().map_err(|_| "a number of percent is expected".to_owned())?;
    if percent >= 0.0 && percent.is_finite() { Ok(percent / 100.0) } else { Err("out of range".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!((percent("1%"), percent("2.5")), (Ok(0.01), Ok(0.025)));
        assert_eq!(bits("4.5"), Ok(4.5));
        for bad in ["-1%", "%", "NaN", "inf", ""] {
            assert!(percent(bad).is_err() && bits(bad).is_err(), "{bad}");
        }
        assert!(bits("0").is_err());
    }

    #[test]
    fn names_of_formats() {
        let mix = format("auto:mxfp6").unwrap();
        assert_eq!((mix.is_mix, mix.scheme.to_string().as_str()), (true, "mxfp4:mxfp6_e2m3"));
        assert!(!format("w4a6").unwrap().is_mix);
        assert!(format("auto:mxfp5").unwrap_err().contains("mxfp5"));
    }
}
