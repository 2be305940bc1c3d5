//! From a BF16 checkpoint over `mxconvert` and `mxserve` to the answers of a client, on a real model.

mod common;
mod crowd;
mod footprint;
mod oracle;
mod perplexity;
