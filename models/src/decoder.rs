//! The decoder that the Llama family shares: embedding, layers, final norm, output head.

use kernels::{Backend, Buffer, InputForm, Weight};

use crate::layers::{Attention, DecoderLayer, GatedMlp, Linear, Module, RmsNorm, parameter};
use crate::parameters::ParameterSource;
use crate::staged::Stage;
use crate::{KvCache, LinearInfo, Model, ModelConfig, ModelError, Observer, StepInputs, Workspace};

/// Where a checkpoint keeps the modules of a decoder. Names of a layer's modules follow `{layers}.{index}.`.
#[derive(Debug)]
pub(crate) struct WeightNames {
    pub(crate) embed: &'static str,
    pub(crate) layers: &'static str,
    pub(crate) input_norm: &'static str,
    pub(crate) qkv: [&'static str; 3],
    pub(crate) qk_norm: [&'static str; 2],
    pub(crate) attention_output: &'static str,
    pub(crate) post_attention_norm: &'static str,
    pub(crate) gate_up: [&'static str; 2],
    pub(crate) down: &'static str,
    pub(crate) norm: &'static str,
    pub(crate) head: &'static str,
}

/// A loaded decoder.
#[derive(Debug)]
pub(crate) struct Decoder {
    config: ModelConfig,
    embed: Weight,
    inv_freq: Buffer,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    head: Head,
    head_name: &'static str,
}

/// The output head.
#[derive(Debug)]
enum Head {
    /// The embedding, used a second time.
    Tied,
    /// A weight of its own.
    Own(Linear),
}

impl Decoder {
    /// Loads the weights that `config` calls for.
    pub(crate) fn load(
        backend: &dyn Backend,
        source: &dyn ParameterSource,
        config: ModelConfig,
        names: &WeightNames,
    ) -> Result<Self, ModelError> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embed = backend.upload(&[source.linear(names.embed, [vocab, hidden])?.source()], None)?;
        let loader = LayerLoader { backend, source, config: &config, names };
        let layers = (0..config.num_layers).map(|index| loader.load(index)).collect::<Result<_, _>>()?;
        let norm = RmsNorm::load(backend, source, names.norm, hidden, config.rms_norm_eps)?;
        // A tied checkpoint may still carry a head: a plain copy of the embedding is not loaded twice, a quantized
        // head is meant to be used.
        let head = if config.tie_word_embeddings && !source.is_quantized(names.head)? {
            Head::Tied
        } else {
            let module = Module { name: names.head.to_owned(), rows: vocab };
            Head::Own(Linear::load(backend, source, &[module], hidden, false)?)
        };
        let inv_freq = parameter(backend, &config.rope.inv_freq)?;
        Ok(Self { config, embed, inv_freq, layers, norm, head, head_name: names.head })
    }
}

/// Loads decoder layers, whole or a group of linear modules at a time.
pub(crate) struct LayerLoader<'a> {
    pub(crate) backend: &'a dyn Backend,
    pub(crate) source: &'a dyn ParameterSource,
    pub(crate) config: &'a ModelConfig,
    pub(crate) names: &'a WeightNames,
}

impl LayerLoader<'_> {
    /// Layer `index`.
    pub(crate) fn load(&self, index: usize) -> Result<DecoderLayer, ModelError> {
        let Self { config, names, .. } = *self;
        let (hidden, heads) = (config.hidden_size, config.heads);
        let norm = |name: &str, len| {
            let module = format!("{}.{index}.{name}", names.layers);
            RmsNorm::load(self.backend, self.source, &module, len, config.rms_norm_eps)
        };
        let qk_norm = if config.qk_norm {
            let [q_norm, k_norm] = names.qk_norm;
            Some([norm(q_norm, heads.dim)?, norm(k_norm, heads.dim)?])
        } else {
            None
        };
        Ok(DecoderLayer {
            input_norm: norm(names.input_norm, hidden)?,
            attention: Attention {
                qkv: self.linear(index, Stage::Qkv)?,
                qk_norm,
                output: self.linear(index, Stage::AttentionOutput)?,
                heads,
                window: config.windows[index],
            },
            post_attention_norm: norm(names.post_attention_norm, hidden)?,
            mlp: GatedMlp {
                gate_up: self.linear(index, Stage::GateUp)?,
                down: self.linear(index, Stage::Down)?,
                width: config.intermediate_size,
            },
        })
    }

    /// The linear modules of one stage of layer `index`.
    pub(crate) fn linear(&self, index: usize, stage: Stage) -> Result<Linear, ModelError> {
        let biases = self.config.biases;
        let bias = match stage {
            Stage::Qkv => biases.qkv,
            Stage::AttentionOutput => biases.output,
            Stage::GateUp | Stage::Down => biases.mlp,
        };
        let (modules, cols) = self.names.stage(self.config, index, stage);
        match stage {
            Stage::GateUp => Linear::load_gated(self.backend, self.source, &modules, cols, bias),
            Stage::Qkv | Stage::AttentionOutput | Stage::Down => {
                Linear::load(self.backend, self.source, &modules, cols, bias)
            }
        }
    }
}

impl WeightNames {
    /// Every linear module of a model, in the order in which it is loaded: the embedding first, the output head last.
    pub(crate) fn linear_modules(&self, config: &ModelConfig) -> Vec<String> {
        let stages = (0..config.num_layers).flat_map(|index| Stage::ALL.map(|stage| (index, stage)));
        let of_layers = stages.flat_map(|(index, stage)| self.stage(config, index, stage).0);
        let of_layers = of_layers.map(|module| module.name);
        std::iter::once(self.embed.to_owned()).chain(of_layers).chain([self.head.to_owned()]).collect()
    }

    /// The linear modules of one stage of layer `index`, and the width K of their input.
    pub(crate) fn stage(&self, config: &ModelConfig, index: usize, stage: Stage) -> (Vec<Module>, usize) {
        let (hidden, width, heads) = (config.hidden_size, config.intermediate_size, config.heads);
        let (q_width, kv_width) = (heads.q_width(), heads.kv * heads.dim);
        let module = |name: &str, rows| Module { name: format!("{}.{index}.{name}", self.layers), rows };
        match stage {
            Stage::Qkv => {
                let [q, k, v] = self.qkv;
                (vec![module(q, q_width), module(k, kv_width), module(v, kv_width)], hidden)
            }
            Stage::AttentionOutput => (vec![module(self.attention_output, hidden)], q_width),
            Stage::GateUp => (self.gate_up.map(|name| module(name, width)).into(), hidden),
            Stage::Down => (vec![module(self.down, hidden)], width),
        }
    }
}

impl Model for Decoder {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn forward_observed(
        &self,
        backend: &dyn Backend,
        step: &StepInputs,
        kv: &mut KvCache,
        ws: &mut Workspace,
        observer: &mut dyn Observer,
    ) {
        let rows = step.rows();
        backend.embed(&self.embed, &step.tokens, rows, &mut ws.residual);
        backend.rope_table(&step.positions, &self.inv_freq, self.config.rope.factor, rows, &mut ws.rope);
        let mut outputs = rows;
        for (index, (layer, cache)) in self.layers.iter().zip(kv.layers_mut()).enumerate() {
            let form = layer.attention.qkv.input_form(backend, rows);
            if index == 0 {
                layer.input_norm.forward(backend, rows, form, ws);
            } else {
                layer.input_norm.add_forward(backend, rows, form, ws);
            }
            let mut observe = |linear: &Linear, x: &Buffer| {
                observer.linear_input(index, &mut linear.module_names(), x, linear.cols());
            };
            match step.output_rows().filter(|_| index + 1 == self.layers.len()) {
                None => layer.forward(backend, step, cache, ws, &mut observe),
                Some(some) => {
                    layer.forward_outputs(backend, step, some, cache, ws, &mut observe);
                    outputs = some.1;
                }
            }
        }
        if outputs == 0 {
            return;
        }
        // Heads multiply some of the rows, whatever these are.
        self.norm.add_forward(backend, outputs, InputForm::Plain, ws);
        if step.output_rows().is_some() {
            ws.exchange_outputs();
        }
    }

    fn logits(&self, backend: &dyn Backend, rows: &[u32], ws: &mut Workspace) {
        let (count, max) = (rows.len(), ws.max_logit_rows());
        assert!(count <= max, "logits of {count} rows in a workspace for {max}");
        // The first rows, as every decode step wants them, are in place already.
        let hidden = if rows.iter().copied().eq(0..count as u32) {
            &ws.normed
        } else {
            backend.write_u32(&mut ws.logit_rows, 0, rows);
            let width = self.config.hidden_size;
            backend.gather_rows(&ws.normed, &ws.logit_rows, count, width, &mut ws.logit_hidden);
            &ws.logit_hidden
        };
        match &self.head {
            Head::Tied => {
                let vocab = self.config.vocab_size;
                backend.linear(hidden, count, &self.embed, &mut ws.logits, vocab, 0);
            }
            Head::Own(head) => head.forward(backend, hidden, count, &mut ws.logits),
        }
    }

    fn linear_info(&self) -> Vec<LinearInfo> {
        let mut rows: Vec<LinearInfo> = Vec::new();
        for part in self.layers.iter().flat_map(DecoderLayer::linears).flat_map(Linear::parts) {
            add(&mut rows, &part.group, &part.weight);
        }
        match &self.head {
            Head::Tied => add(&mut rows, self.head_name, &self.embed),
            Head::Own(head) => head.parts().iter().for_each(|part| add(&mut rows, &part.group, &part.weight)),
        }
        rows
    }

    fn parameters(&self) -> usize {
        let [vocab, hidden] = self.embed.shape();
        let head = match &self.head {
            Head::Tied => 0,
            Head::Own(head) => head.parameters(),
        };
        let layers: usize = self.layers.iter().map(DecoderLayer::parameters).sum();
        vocab * hidden + layers + self.norm.parameters() + head
    }

    fn has_gates_apart(&self) -> bool {
        self.layers.iter().any(|layer| layer.mlp.gate_up.parts().len() > 1)
    }
}

/// Adds `weight` to the row of its group and scheme.
fn add(rows: &mut Vec<LinearInfo>, group: &str, weight: &Weight) {
    let parameters = weight.shape().into_iter().product::<usize>();
    let (scheme, bytes) = (weight.scheme(), weight.bytes());
    match rows.iter_mut().find(|row| row.group == group && row.scheme == scheme) {
        Some(row) => {
            row.layers += 1;
            row.parameters += parameters;
            row.bytes += bytes;
        }
        None => rows.push(LinearInfo { group: group.to_owned(), scheme, layers: 1, parameters, bytes }),
    }
}
