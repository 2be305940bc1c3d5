//! Reading weights ahead of whoever asks for them, while those before them are packed and on their way to a device.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

use crate::ModelError;
use crate::checkpoint::{Checkpoint, CheckpointError, LinearTensor};
use crate::parameters::{ParameterSource, check_shape};

/// Tensors that wait, read, beside the one being read and the one in use.
const WAITING: usize = 1;

/// A module's name and its weight.
type Read = (String, Result<LinearTensor, CheckpointError>);

/// A checkpoint whose linear modules a thread reads in the order in which they will be asked for.
pub(crate) struct ReadAhead<'a> {
    checkpoint: &'a Checkpoint,
    /// `None` once someone asked for another module than the next: from then on all are read when asked for.
    next: RefCell<Option<Receiver<Read>>>,
}

impl<'a> ReadAhead<'a> {
    /// Starts reading `modules`, in this order. The thread ends with the last of them, or when this is dropped.
    pub(crate) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        checkpoint: &'a Checkpoint,
        modules: Vec<String>,
    ) -> Self
    where
        'a: 'scope,
    {
        let (sender, receiver) = sync_channel(WAITING);
        scope.spawn(move || read_all(checkpoint, modules, &sender));
        Self { checkpoint, next: RefCell::new(Some(receiver)) }
    }
}

fn read_all(checkpoint: &Checkpoint, modules: Vec<String>, sender: &SyncSender<Read>) {
    let pool = Arc::default();
    for module in modules {
        let tensor = checkpoint.linear_from(&pool, &module);
        if sender.send((module, tensor)).is_err() {
            return;
        }
    }
}

impl ParameterSource for ReadAhead<'_> {
    fn linear(&self, module: &str, shape: [usize; 2]) -> Result<LinearTensor, ModelError> {
        let mut next = self.next.borrow_mut();
        let read = next.as_ref().and_then(|receiver| receiver.recv().ok());
        let tensor = match read.filter(|(name, _)| name == module) {
            Some((_, tensor)) => tensor?,
            None => {
                *next = None;
                self.checkpoint.linear(module)?
            }
        };
        check_shape(module, &tensor.shape(), &shape)?;
        Ok(tensor)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        ParameterSource::vector(self.checkpoint, name, len)
    }

    fn is_quantized(&self, module: &str) -> Result<bool, ModelError> {
        ParameterSource::is_quantized(self.checkpoint, module)
    }
}
