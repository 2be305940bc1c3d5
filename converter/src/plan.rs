//! What happens to each tensor: a recipe applied to tensor names and shapes. Pure.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use kernels::mx::{Cast, Rotation, ScaleRounding, Scheme};
use models::checkpoint::quantization::is_embedding;
use models::checkpoint::{ModulePattern, dense_dtype};

use crate::source::SourceTensor;

/// Module of the output projection.
pub const LM_HEAD: &str = "lm_head";

/// What names of decoder layers begin with.
pub(crate) const LAYERS: &str = "model.layers.";

/// Projections that loaders fuse into one matrix, which then has one scheme.
const FUSED: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Scheme of the linear modules of the decoder layers.
    pub scheme: Scheme,
    /// Schemes by pattern; the last match wins. Patterns also reach `lm_head` and the embeddings.
    pub layers: Vec<(ModulePattern, Scheme)>,
    /// Modules left as they are, whatever `layers` says.
    pub exclude: Vec<ModulePattern>,
    /// Scale rule for weights and activations; `None` is each format's default.
    pub scale_rounding: Option<ScaleRounding>,
    /// Scale rule for weights, where `scale_rounding` is `None`.
    pub weight_scale_rounding: Option<ScaleRounding>,
    /// Scale rule for activations, instead of `scale_rounding`.
    pub activation_scale_rounding: Option<ScaleRounding>,
    /// The file that it was read from.
    pub file: Option<PathBuf>,
    /// How the rows of the decoder layers' modules are rotated before they are quantized.
    pub rotation: Option<Rotation>,
}

impl Recipe {
    /// Every linear module of the decoder layers in `scheme`.
    pub fn new(scheme: Scheme) -> Self {
        Self {
            scheme,
            layers: Vec::new(),
            exclude: Vec::new(),
            scale_rounding: None,
            weight_scale_rounding: None,
            activation_scale_rounding: None,
            file: None,
            rotation: None,
        }
    }

    /// `scheme` with the recipe's scale rules, and its rotation in decoder layers.
    fn complete(&self, module: &str, scheme: Scheme) -> Scheme {
        Scheme {
            rotation: self.rotation.filter(|_| module.starts_with(LAYERS)),
            ..self.with_rounding(scheme)
        }
    }

    /// `scheme` with the recipe's scale rules.
    pub(crate) fn with_rounding(&self, scheme: Scheme) -> Scheme {
        let apply = |cast: Cast, rule: Option<ScaleRounding>| Cast {
            scale_rounding: rule.unwrap_or(cast.scale_rounding),
            ..cast
        };
        let activation_rule = self.activation_scale_rounding.or(self.scale_rounding);
        Scheme {
            weight: apply(scheme.weight, self.scale_rounding.or(self.weight_scale_rounding)),
            activation: scheme.activation.map(|cast| apply(cast, activation_rule)),
            rotation: scheme.rotation,
        }
    }
}

/// What happens to one source tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Copied byte for byte.
    Copy,
    /// Rounded to BF16: dequantized GGUF tensors that stay unquantized.
    ToBf16,
    /// Quantized to the scheme's weight format.
    Quantize(Scheme),
}

/// One line of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Index of the source tensor.
    pub source: usize,
    /// Name in the output; codes and scales are named after its module.
    pub name: String,
    /// What happens to it.
    pub action: Action,
}

impl PlannedTensor {
    /// The module, if this is a weight.
    pub fn module(&self) -> Option<&str> {
        self.name.strip_suffix(".weight")
    }
}

/// What happens to every tensor, in the source's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The tensors.
    pub tensors: Vec<PlannedTensor>,
    /// Every linear module, the head included, and its scheme; `None` stays unquantized.
    pub linears: BTreeMap<String, Option<Scheme>>,
    /// The head gets a weight of its own: `tie_word_embeddings` becomes false.
    pub unties_head: bool,
    /// What the user should know, a sentence each.
    pub warnings: Vec<String>,
}

/// A recipe that does not fit the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A module to quantize has a weight that is no matrix.
    #[error("tensor {tensor}: shape {shape:?} where [rows, cols] is expected")]
    NotAMatrix {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The head is to be made from the embedding, which is not there.
    #[error(
        "--layer lm_head: the model is tied and has no embedding (embed_tokens.weight) to make the head from"
    )]
    NoEmbedding,
    /// Two tensors of the output would have one name.
    #[error(
        "tensor {tensor}: the source has a tensor of this name, which quantizing {module}.weight makes too"
    )]
    NameTaken {
        /// The tensor.
        tensor: String,
        /// The module whose codes or scales take the name.
        module: String,
    },
    /// A pattern without effect is a typing mistake.
    #[error("{flag} '{pattern}' matches no linear module")]
    MatchesNothing {
        /// `--layer` or `--exclude`, and the file that such patterns also came from.
        flag: String,
        /// The pattern.
        pattern: String,
    },
    /// A block would span two rows.
    #[error(
        "tensor {tensor}: {cols} columns are not a multiple of the block size {block}; --exclude leaves it as it is"
    )]
    PartialBlock {
        /// The tensor.
        tensor: String,
        /// Its columns, K.
        cols: usize,
        /// Elements per scale.
        block: usize,
    },
    /// A weight is not BF16, F16 or F32.
    #[error("tensor {tensor}: {dtype} where BF16, F16 or F32 is expected")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
    },
    /// The recipe quantizes nothing.
    #[error("nothing to quantize: the model has no linear modules in decoder layers that the recipe reaches")]
    Nothing,
}

impl PlanError {
    /// The source tensor that does not fit, if it is one.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::NotAMatrix { tensor, .. }
            | Self::NameTaken { tensor, .. }
            | Self::PartialBlock { tensor, .. }
            | Self::Dtype { tensor, .. } => Some(tensor),
            Self::NoEmbedding | Self::MatchesNothing { .. } | Self::Nothing => None,
        }
    }
}

/// How the source ties and stores its tensors.
#[derive(Debug, Clone, Copy)]
pub struct SourceTraits {
    /// The head is the embedding.
    pub tied: bool,
    /// Unquantized tensors are written as BF16 instead of copied.
    pub to_bf16: bool,
}

/// Applies `recipe` to the source's tensors.
///
/// # Errors
/// A pattern matches nothing, a weight is no matrix of floats in whole blocks, or a name is taken: see [`PlanError`].
pub fn plan(recipe: &Recipe, tensors: &[SourceTensor], source: SourceTraits) -> Result<Plan, PlanError> {
    let candidates = candidates(tensors, source.tied);
    let schemes = assign(recipe, &candidates)?;
    let head_of_its_own = source.tied && schemes.contains_key(LM_HEAD);

    let mut planned = Vec::with_capacity(tensors.len() + 1);
    for (index, tensor) in tensors.iter().enumerate() {
        let module = tensor.name.strip_suffix(".weight").unwrap_or_default();
        if head_of_its_own && module == LM_HEAD {
            // A stored copy of the embedding: the head is made from the embedding itself.
            continue;
        }
        let action = match schemes.get(module) {
            Some(&scheme) => Action::Quantize(check(tensor, scheme)?),
            None if source.to_bf16 => Action::ToBf16,
            None => Action::Copy,
        };
        planned.push(PlannedTensor { source: index, name: tensor.name.clone(), action });
        if head_of_its_own && is_embedding(module) {
            let scheme = check(tensor, schemes[LM_HEAD])?;
            planned.push(PlannedTensor {
                source: index,
                name: format!("{LM_HEAD}.weight"),
                action: Action::Quantize(scheme),
            });
        }
    }
    if schemes.is_empty() {
        return Err(PlanError::Nothing);
    }
    if head_of_its_own && !planned.iter().any(|tensor| tensor.module() == Some(LM_HEAD)) {
        return Err(PlanError::NoEmbedding);
    }
    check_names(&planned)?;
    // Routers and the like are linear modules too: loaders must be told that they are not quantized.
    let modules = tensors.iter().filter_map(|tensor| {
        let module = tensor.name.strip_suffix(".weight")?;
        (tensor.shape.len() == 2 || is_layer_linear(module)).then_some(module)
    });
    let linears: BTreeMap<String, Option<Scheme>> = modules
        .chain([LM_HEAD])
        .filter(|module| !is_embedding(module))
        .map(|module| (module.to_owned(), schemes.get(module).copied()))
        .collect();
    let warnings = fused_warnings(&linears);
    Ok(Plan { tensors: planned, linears, unties_head: head_of_its_own, warnings })
}

/// Modules that patterns can name: `*_proj` inside decoder layers, the embeddings, the head (also a tied one).
fn candidates(tensors: &[SourceTensor], tied: bool) -> Vec<String> {
    let mut modules: Vec<String> = tensors
        .iter()
        .filter_map(|tensor| tensor.name.strip_suffix(".weight"))
        .filter(|module| is_layer_linear(module) || is_embedding(module) || *module == LM_HEAD)
        .map(str::to_owned)
        .collect();
    if tied && !modules.iter().any(|module| module == LM_HEAD) {
        modules.push(LM_HEAD.to_owned());
    }
    modules
}

fn is_layer_linear(module: &str) -> bool {
    module.starts_with(LAYERS) && module.ends_with("_proj")
}

/// The scheme of each module that is quantized.
fn assign(recipe: &Recipe, modules: &[String]) -> Result<BTreeMap<String, Scheme>, PlanError> {
    let patterns = recipe.layers.iter().map(|(pattern, _)| ("--layer", pattern));
    for (flag, pattern) in patterns.chain(recipe.exclude.iter().map(|pattern| ("--exclude", pattern))) {
        if !modules.iter().any(|module| pattern.matches(module)) {
            let file = recipe.file.as_ref().map(|file| format!("--recipe {} or ", file.display()));
            let flag = file.unwrap_or_default() + flag;
            return Err(PlanError::MatchesNothing { flag, pattern: pattern.to_string() });
        }
    }
    let mut schemes = BTreeMap::new();
    for module in modules {
        if recipe.exclude.iter().any(|pattern| pattern.matches(module)) {
            continue;
        }
        let named = recipe.layers.iter().rev().find(|(pattern, _)| pattern.matches(module));
        let scheme = named.map(|(_, scheme)| *scheme).or(is_layer_linear(module).then_some(recipe.scheme));
        if let Some(scheme) = scheme {
            schemes.insert(module.clone(), recipe.complete(module, scheme));
        }
    }
    Ok(schemes)
}

/// `scheme`, if the tensor can be quantized to it.
fn check(tensor: &SourceTensor, scheme: Scheme) -> Result<Scheme, PlanError> {
    if dense_dtype(tensor.dtype).is_none() {
        return Err(PlanError::Dtype { tensor: tensor.name.clone(), dtype: tensor.dtype.to_string() });
    }
    let &[_, cols] = tensor.shape.as_slice() else {
        return Err(PlanError::NotAMatrix { tensor: tensor.name.clone(), shape: tensor.shape.clone() });
    };
    let casts = [Some(scheme.weight), scheme.activation];
    let block = casts.iter().flatten().map(|cast| cast.format.block.size()).max().unwrap_or(1);
    if !cols.is_multiple_of(block) {
        return Err(PlanError::PartialBlock { tensor: tensor.name.clone(), cols, block });
    }
    Ok(scheme)
}

/// The names of codes and scales, in whatever layout, are free.
fn check_names(planned: &[PlannedTensor]) -> Result<(), PlanError> {
    let mut names = HashSet::new();
    if let Some(again) = planned.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        let module = again.module().unwrap_or(&again.name).to_owned();
        return Err(PlanError::NameTaken { tensor: again.name.clone(), module });
    }
    let quantized = planned.iter().filter(|tensor| matches!(tensor.action, Action::Quantize(_)));
    for module in quantized.filter_map(PlannedTensor::module) {
        for suffix in ["weight_scale", "weight_packed"] {
            let tensor = format!("{module}.{suffix}");
            if names.contains(tensor.as_str()) {
                return Err(PlanError::NameTaken { tensor, module: module.to_owned() });
            }
        }
    }
    Ok(())
}

/// Loaders that fuse q, k, v and gate, up (vLLM) want one scheme in each group.
fn fused_warnings(linears: &BTreeMap<String, Option<Scheme>>) -> Vec<String> {
    let mut warnings = Vec::new();
    for group in FUSED {
        let mut mixed = linears.iter().filter_map(|(module, scheme)| {
            let parent = module.strip_suffix(group[0])?;
            let others = group[1..].iter().filter_map(|name| linears.get(&format!("{parent}{name}")));
            others.into_iter().any(|other| other != scheme).then_some(parent)
        });
        if let Some(first) = mixed.next() {
            warnings.push(format!(
                "{} differ in {} and {} more: loaders that fuse them (vLLM) refuse such a checkpoint; \
                 give them one format",
                group.join(", "),
                first.trim_end_matches('.'),
                mixed.count(),
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests;
