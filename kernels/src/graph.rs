//! Operators that were recorded once, to run again with one call.

/// A recorded sequence of operators; see [`Backend::capture`](crate::Backend::capture).
#[derive(Debug)]
pub struct Graph(pub(crate) GraphKind);

/// The devices that record.
#[derive(Debug)]
pub(crate) enum GraphKind {
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Graph),
}
