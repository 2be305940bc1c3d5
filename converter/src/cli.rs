//! The command line: what was said ([`Cli`]), and what it means ([`Invocation`]).

mod calibration;
mod eval;
mod mix;
mod study;

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use converter::calibrate::Calibration;
use converter::eval::EvalOptions;
use converter::mix::{Mix, MixText};
use converter::permute::Permute;
use converter::plan::Recipe;
use converter::study::StudyOptions;
use converter::{Options, default_output};
use kernels::mx::{ElementRounding, MxFormat, Rotation, ScaleRounding, Scheme};
use models::checkpoint::ModulePattern;
use models::checkpoint::quantization::Dialect;

use calibration::Method;

/// Packs BF16, F16 and F32 checkpoints into Microscaling (MX) formats.
#[derive(Debug, Parser)]
#[command(
    name = "mxconvert",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    convert: Option<ConvertArgs>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints what a checkpoint holds: formats, bytes, bits per weight.
    Inspect {
        /// A checkpoint folder, quantized or not.
        dir: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Measures checkpoints side by side: perplexity of texts, distance from the unquantized one, tasks.
    Eval(eval::EvalArgs),
    /// Measures what every choice of an MX format costs this model; writes an HTML report and JSON.
    Study(study::StudyArgs),
}

#[derive(Debug, Args)]
struct ConvertArgs {
    /// A Hugging Face folder, or a GGUF file of the llama architecture (a folder named `inspect` is `./inspect`).
    model: PathBuf,

    /// WEIGHT or WEIGHT:ACTIVATION of mxint8, mxfp8, mxfp8_e5m2, mxfp6, mxfp6_e3m2, mxfp4, mxint4, mxfp4_e3m0;
    /// or w4a4, w4a6, w4a8, w6a6, w6a8, w8a8; or auto, auto:ACTIVATION: a mix of weight formats, chosen by what each does
    /// to each group of modules, on the text of --calibration if there is one.
    #[arg(short, long, value_parser = mix::format, required_unless_present = "recipe")]
    format: Option<mix::Format>,

    /// Formats by module, as --format auto leaves them in mx_recipe.json.
    #[arg(long, value_name = "FILE", value_parser = mix::recipe, conflicts_with = "format")]
    recipe: Option<Recipe>,

    /// With --format auto: bits per weight of the mixed modules, scales included, at most.
    #[arg(long, value_parser = mix::bits, conflicts_with = "max_ppl_increase")]
    bits: Option<f64>,

    /// With --format auto: the fewest bits whose direct cast raises the perplexity of held-out windows of the calibration
    /// text by this much at most, as in 1%.
    #[arg(long, value_name = "PERCENT", value_parser = mix::percent, requires = "calibration")]
    max_ppl_increase: Option<f64>,

    /// With --format auto: the formats to choose from [default: mxfp4,mxfp6_e2m3,mxfp6_e3m2,mxfp8_e4m3,mxint8, or those
    /// of them that --layout has a place for].
    #[arg(long, value_name = "FORMATS", value_delimiter = ',')]
    candidates: Vec<MxFormat>,

    /// Folder to make [default: MODEL-FORMAT, or MODEL-RECIPE].
    #[arg(short, long)]
    output: Option<PathBuf>,

    /// Another format for some modules: a glob, or a regular expression after `re:`; the last match wins. Also
    /// reaches lm_head and model.embed_tokens.
    #[arg(long, value_name = "PATTERN=FORMAT", value_parser = layer)]
    layer: Vec<(ModulePattern, Scheme)>,

    /// Modules to leave as they are.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<ModulePattern>,

    /// Rule for shared scales, floor, ceil, rceil, even or mse, of weights and of activations
    /// [default: mxfp4, mxfp6 even; mxfp8 rceil; mxint8 floor].
    #[arg(long, value_name = "RULE")]
    scale_rounding: Option<ScaleRounding>,

    /// Rule for the shared scales of activations [default: that of --scale-rounding].
    #[arg(long, value_name = "RULE")]
    activation_scale_rounding: Option<ScaleRounding>,

    /// Rotates each block of the weights' rows, and the layers' inputs at run time (in the layout ocp-mx alone):
    /// outliers spread over their block.
    #[arg(long, value_name = "block-hadamard")]
    rotate: Option<Rotation>,

    /// Reorders the channels between gate, up and down, and between v and o, by their range, wherever that lowers the error
    /// of down or o, on the text of --calibration if there is one: the model stays the same.
    #[arg(long, value_name = "range", value_parser = ["range"])]
    permute: Option<String>,

    /// Quantization method [default: gptq with --calibration, nearest without].
    #[arg(long, value_enum)]
    method: Option<Method>,

    /// A text to calibrate on, like those that the model will see.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Windows of the calibration text, at most.
    #[arg(long, value_name = "N", default_value_t = 128, requires = "calibration")]
    calibration_windows: usize,

    /// Tokens of a window.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, requires = "calibration")]
    calibration_window: usize,

    /// How much of what earlier modules got wrong a module is to make up for, from 0 to 1 [default: 0.5].
    #[arg(long, value_name = "SHARE", requires = "calibration", value_parser = calibration::share)]
    drift_correction: Option<f32>,

    /// How elements are rounded where they are cast directly; stochastic is for experiments.
    #[arg(long, value_enum, default_value_t = Rounding::Nearest)]
    element_rounding: Rounding,

    /// Seed of stochastic rounding.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Tensor names and JSON: compressed-tensors, quark or ocp-mx [default: by format].
    #[arg(long)]
    layout: Option<Dialect>,

    /// Largest safetensors file, as in 5GB or 512MiB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    max_shard_size: u64,

    /// Worker threads [default: all cores].
    #[arg(long)]
    threads: Option<NonZeroUsize>,

    /// Print what would be done; write nothing.
    #[arg(long)]
    dry_run: bool,

    /// Write the report, with every tensor, as JSON; as a page where the name ends in .html. May be repeated.
    #[arg(long, value_name = "FILE")]
    report: Vec<PathBuf>,

    /// Measure source and output on this text afterwards: perplexity, and the distance between them.
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    evaluate: Option<PathBuf>,

    /// Replace an existing checkpoint.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Rounding {
    /// To the nearest value, ties to even.
    Nearest,
    /// Up or down with probability by distance.
    Stochastic,
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Invocation {
    /// Convert a checkpoint.
    Convert {
        /// What and how.
        options: Box<Options>,
        /// Where to write the report.
        reports: Vec<PathBuf>,
        /// A text to measure the source and the output on.
        evaluate: Option<PathBuf>,
    },
    /// Say what a checkpoint holds.
    Inspect {
        /// The checkpoint.
        dir: PathBuf,
        /// As JSON.
        json: bool,
    },
    /// Study the design space on a model.
    Study {
        /// What and how.
        options: StudyOptions,
        /// The HTML report; JSON lies beside it.
        output: PathBuf,
    },
    /// Measure checkpoints.
    Eval {
        /// What and how.
        options: Box<EvalOptions>,
        /// As JSON.
        json: bool,
    },
}

impl Cli {
    /// Parses the process's arguments. What is wrong with them is one line, as for every other error.
    pub(crate) fn invocation() -> Result<Invocation, ExitCode> {
        match Self::try_parse().and_then(Self::checked) {
            Ok(cli) => Ok(cli.into_invocation()),
            Err(error) if error.use_stderr() => {
                let text = error.to_string();
                // The first paragraph says what is wrong; usage hints follow.
                let paragraph = text.split("\n\n").next().unwrap_or_default();
                let line = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
                let _ = writeln!(std::io::stderr(), "{line}");
                Err(ExitCode::FAILURE)
            }
            Err(help) => {
                let _ = help.print();
                Err(ExitCode::SUCCESS)
            }
        }
    }

    /// What clap cannot say about flags that go together.
    fn checked(self) -> Result<Self, clap::Error> {
        let Some(args) = &self.convert else { return Ok(self) };
        let aimed = args.bits.is_some() || args.max_ppl_increase.is_some();
        let message = match args.format.as_ref().is_some_and(|format| format.is_mix) {
            true if !aimed => "--format auto needs --bits or --max-ppl-increase",
            false if aimed || !args.candidates.is_empty() => {
                "--bits, --max-ppl-increase and --candidates are for --format auto"
            }
            _ => return Ok(self),
        };
        Err(Self::command().error(ErrorKind::ArgumentConflict, message))
    }

    fn into_invocation(self) -> Invocation {
        match self.command {
            Some(Command::Inspect { dir, json }) => return Invocation::Inspect { dir, json },
            Some(Command::Eval(args)) => return args.into_invocation(),
            Some(Command::Study(args)) => return args.into_invocation(),
            None => {}
        }
        let args = self.convert.expect("clap requires MODEL and --format without a subcommand");
        let calibration = calibration::method(args.method, args.calibration.as_ref()).map(|method| {
            // Whether a method lacks its text is for the conversion to say.
            let default = Calibration::new(method, args.calibration.clone().unwrap_or_default());
            Calibration {
                windows: args.calibration_windows,
                window_tokens: args.calibration_window,
                drift_correction: args.drift_correction.unwrap_or(default.drift_correction),
                ..default
            }
        });
        let (format, mut recipe) = match (args.format, args.recipe) {
            (Some(format), _) => (format.clone(), Recipe::new(format.scheme)),
            (None, Some(recipe)) => (mix::named(&recipe), recipe),
            (None, None) => unreachable!("clap requires --format or --recipe"),
        };
        let permute = args.permute.map(|_| Permute { text: args.calibration.clone() });
        let text = args.calibration.map(|path| MixText {
            path,
            windows: args.calibration_windows,
            window_tokens: args.calibration_window,
        });
        // Those of the command line win over those of the file.
        recipe.layers.extend(args.layer);
        recipe.exclude.extend(args.exclude);
        let recipe = Recipe {
            weight_scale_rounding: calibration.is_some().then_some(ScaleRounding::Mse),
            scale_rounding: args.scale_rounding,
            activation_scale_rounding: args.activation_scale_rounding,
            rotation: args.rotate.or(recipe.rotation),
            ..recipe
        };
        let output = args.output.unwrap_or_else(|| default_output(&args.model, &format.name));
        let mut options = Options {
            calibration,
            mix: mix::target(args.bits, args.max_ppl_increase).filter(|_| format.is_mix).map(|target| Mix {
                target,
                formats: mix::formats(args.candidates, args.layout, format.scheme.activation),
                text,
            }),
            permute,
            element_rounding: match args.element_rounding {
                Rounding::Nearest => ElementRounding::NearestEven,
                Rounding::Stochastic => ElementRounding::Stochastic { seed: args.seed },
            },
            layout: args.layout,
            max_shard_bytes: args.max_shard_size,
            force: args.force,
            dry_run: args.dry_run,
            ..Options::new(args.model, output, recipe)
        };
        if let Some(threads) = args.threads {
            options.threads = threads;
        }
        Invocation::Convert { options: Box::new(options), reports: args.report, evaluate: args.evaluate }
    }
}

fn layer(text: &str) -> Result<(ModulePattern, Scheme), String> {
    // The last '=': regular expressions may hold others.
    let (pattern, format) = text.rsplit_once('=').ok_or("PATTERN=FORMAT is expected")?;
    let pattern: ModulePattern = pattern.parse().map_err(|e| format!("{e}"))?;
    let scheme: Scheme = format.parse().map_err(|e| format!("{e}"))?;
    Ok((pattern, scheme))
}

/// Bytes: a number and kB, MB, GB (powers of 1000) or KiB, MiB, GiB (powers of 1024).
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(format!("unknown unit '{unit}'; known: B, kB, MB, GB, KiB, MiB, GiB")),
    };
    let number: u64 = number.parse().map_err(|_| "a number and a unit are expected, as in 5GB".to_owned())?;
    number.checked_mul(factor).filter(|bytes| *bytes > 0).ok_or_else(|| "out of range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("100"), Ok(100));
        for bad in ["GB", "5XB", "0", "99999999999GB", "-1"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn layers_split_at_the_last_equals_sign() {
        let (pattern, scheme) = layer("re:.*(?<name>a=b)=w4a6").unwrap();
        assert_eq!(
            (pattern.as_str(), scheme.to_string().as_str()),
            ("re:.*(?<name>a=b)", "mxfp4:mxfp6_e2m3")
        );
        assert!(layer("lm_head").unwrap_err().contains("PATTERN=FORMAT"));
        assert!(layer("lm_head=mxfp5").unwrap_err().contains("mxfp5"));
    }

    #[test]
    fn a_model_or_inspect() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["mxconvert"], args].concat());
        assert!(parse(&["model", "--format", "mxfp4"]).is_ok());
        assert!(parse(&["inspect", "dir", "--json"]).is_ok());
        assert!(parse(&["model"]).is_err());
        assert!(parse(&["model", "--format", "mxfp5"]).unwrap_err().to_string().contains("mxfp5"));
        assert!(parse(&["model", "--format", "mxfp4", "--method", "gptr"]).is_err());
        assert!(parse(&["model"]).unwrap_err().to_string().contains("--format"));
        assert!(parse(&["model", "-f", "mxfp4", "--recipe", "r.json"]).is_err());
        let checked = |args: &[&str]| parse(args).and_then(Cli::checked).map_err(|e| e.to_string());
        assert!(checked(&["model", "-f", "auto:mxfp6", "--bits", "4.5"]).is_ok());
        assert!(checked(&["model", "-f", "auto"]).unwrap_err().contains("--max-ppl-increase"));
        assert!(checked(&["model", "-f", "mxfp4", "--bits", "4.5"]).unwrap_err().contains("--format auto"));
        let increase = ["model", "-f", "auto", "--max-ppl-increase", "1%"];
        assert!(checked(&increase).unwrap_err().contains("--calibration"));
        assert!(checked(&[&increase[..], &["--calibration", "a", "--bits", "5"]].concat()).is_err());
    }
}
