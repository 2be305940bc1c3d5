//! A converted model and a server of it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use config::ServerConfig;
use converter::plan::Recipe;
use converter::{Options, convert};
use serde_json::Value;
use tempfile::TempDir;
use tokenizers::Tokenizer;
use tokio::sync::oneshot;

/// A file of this folder.
pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The tests' real model, in BF16.
pub(crate) fn rustdoc() -> PathBuf {
    data("models/rustdoc-6m")
}

/// The first `windows` windows of 512 tokens of the model's held-out text.
pub(crate) fn heldout_windows(windows: usize) -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_file(rustdoc().join("tokenizer.json")).expect("the tokenizer");
    let text = std::fs::read_to_string(rustdoc().join("heldout.txt")).expect("the text");
    let ids = tokenizer.encode(text, false).expect("tokens");
    ids.get_ids().chunks_exact(512).take(windows).map(<[u32]>::to_vec).collect()
}

/// Converts [`rustdoc`] by `recipe` into a folder that lives as long as the returned guard.
pub(crate) fn converted(recipe: Recipe) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = folder.path().join("model");
    convert(&Options::new(rustdoc(), &output, recipe), &()).expect("conversion");
    (folder, output)
}

/// A server in this process, on a port of its own; stopped when dropped.
pub(crate) struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Serves `model` with the settings that `adjust` makes of the defaults.
    pub(crate) fn start(model: &Path, adjust: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut config = ServerConfig {
            model: Some(model.to_owned()),
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            served_model_name: vec!["model".to_owned()],
            ..ServerConfig::default()
        };
        adjust(&mut config);
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            let stopped = async {
                let _ = stopped.await;
            };
            let ready = move |address, _: &_| ready.send(address).expect("the test waits");
            runtime.block_on(server::serve::serve(config, stopped, ready)).expect("serving");
        });
        let address = is_ready.recv().expect("the server is ready");
        let server = Self { address, stop: Some(stop), thread: Some(thread) };
        server.wait_until_healthy();
        server
    }

    fn wait_until_healthy(&self) {
        block_on(async {
            while !reqwest::get(self.url("/health")).await.is_ok_and(|r| r.status().is_success()) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        });
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// POSTs `body` and returns the answer, which must be a success.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Value {
        let response =
            reqwest::Client::new().post(self.url(path)).json(body).send().await.expect("a response");
        let status = response.status();
        let answer: Value = response.json().await.expect("JSON");
        assert!(status.is_success(), "{status}: {answer}");
        answer
    }

    /// The value of a metric's only or first sample whose labels contain `label`.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> f64 {
        let text = reqwest::get(self.url("/metrics")).await.expect("metrics").text().await.expect("text");
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")) && line.contains(label))
            .unwrap_or_else(|| panic!("no {name} with {label} in\n{text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().expect("dropped once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the server's thread panicked");
    }
}

/// Runs `future` on a runtime of its own.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(future)
}
