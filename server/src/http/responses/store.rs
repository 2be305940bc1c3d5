//! Responses that were given, for clients that come back for them. In memory, and no more than so many.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::task::AbortHandle;

/// Most responses that are kept; the oldest goes first.
const MAX_RESPONSES: usize = 1024;

/// Most bytes of JSON that they have together, conversations included.
const MAX_BYTES: usize = 64 << 20;

/// The responses of late.
#[derive(Debug, Default)]
pub(in crate::http) struct ResponseStore(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    responses: VecDeque<Stored>,
    bytes: usize,
}

/// A response, and what it takes to go on from it.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) id: String,
    /// As clients see it.
    pub(super) response: Value,
    /// The conversation up to and including the answer, as a chat's messages.
    pub(super) messages: Vec<Value>,
    /// What makes it, while it is made in the background.
    pub(super) running: Option<AbortHandle>,
}

impl Stored {
    fn bytes(&self) -> usize {
        self.messages.iter().chain([&self.response]).map(|value| value.to_string().len()).sum()
    }
}

impl ResponseStore {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a response, in place of one with its id.
    pub(super) fn put(&self, stored: Stored) {
        let bytes = stored.bytes();
        let mut kept = self.lock();
        kept.take(&stored.id);
        kept.bytes += bytes;
        kept.responses.push_back(stored);
        while kept.responses.len() > MAX_RESPONSES || kept.bytes > MAX_BYTES {
            let Some(oldest) = kept.responses.pop_front() else { return };
            kept.bytes -= oldest.bytes();
            if let Some(running) = oldest.running {
                running.abort();
            }
        }
    }

    /// As [`put`](Self::put), if a response of this id is still there and still being made.
    pub(super) fn finish(&self, stored: Stored) {
        let is_awaited =
            self.lock().responses.iter().any(|other| other.id == stored.id && other.running.is_some());
        if is_awaited {
            self.put(stored);
        }
    }

    /// Notes what makes a response, if it is still there.
    pub(super) fn set_running(&self, id: &str, running: AbortHandle) {
        match self.lock().responses.iter_mut().find(|stored| stored.id == id) {
            Some(stored) => stored.running = Some(running),
            None => running.abort(),
        }
    }

    /// The response with this id.
    pub(super) fn get(&self, id: &str) -> Option<Stored> {
        self.lock().responses.iter().find(|stored| stored.id == id).cloned()
    }

    /// Takes the response with this id out.
    pub(super) fn remove(&self, id: &str) -> Option<Stored> {
        self.lock().take(id)
    }
}

impl Kept {
    fn take(&mut self, id: &str) -> Option<Stored> {
        let at = self.responses.iter().position(|stored| stored.id == id)?;
        let stored = self.responses.remove(at)?;
        self.bytes -= stored.bytes();
        Some(stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(id: usize, bytes: usize) -> Stored {
        let response = Value::from("x".repeat(bytes));
        Stored { id: id.to_string(), response, messages: Vec::new(), running: None }
    }

    #[test]
    fn the_oldest_goes_first() {
        let store = ResponseStore::default();
        (0..MAX_RESPONSES + 2).for_each(|id| store.put(stored(id, 1)));
        assert!(store.get("1").is_none() && store.get("2").is_some());
        store.put(stored(2, 5));
        assert_eq!(store.lock().responses.len(), MAX_RESPONSES, "in place of its former self");
        store.put(stored(9999, MAX_BYTES - 100));
        assert!(store.get("9999").is_some() && store.get("3").is_none());
        assert!(store.lock().bytes <= MAX_BYTES);
        store.put(stored(10_000, MAX_BYTES + 1));
        assert_eq!(store.lock().responses.len(), 0);
        assert_eq!(store.lock().bytes, 0);
        store.finish(stored(1, 1));
        assert!(store.get("1").is_none() && store.remove("1").is_none(), "nobody waits for it");
    }
}
