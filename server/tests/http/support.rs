//! A server on a free port, in this process, and a client for it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::{ServerConfig, Settings};
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::{Body, Client, Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/rustdoc-6m");

/// A chat template with the tokens that the test model knows.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                                   {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

pub(crate) struct TestServer {
    base: String,
    address: SocketAddr,
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), server::serve::ServeError>>,
    _folder: tempfile::TempDir,
}

impl TestServer {
    /// The test model, with a small KV cache.
    pub(crate) async fn start() -> Self {
        Self::with(|_, _| ()).await
    }

    /// `change` may change the settings, and write to the folder, which is removed with the server.
    pub(crate) async fn with(change: impl FnOnce(&mut Settings, &Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            model: Some(PathBuf::from(MODEL)),
            host: Some([127, 0, 0, 1].into()),
            port: Some(0),
            kv_cache_memory_bytes: Some(16 << 20),
            ..Settings::default()
        };
        change(&mut settings, folder.path());
        let config = ServerConfig::resolve(Settings::default(), settings).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, address) = oneshot::channel();
        let stopped = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(server::serve::serve(config, stopped, move |address, _| {
            ready.send(address).unwrap();
        }));
        let address = address.await.expect("the server starts");
        let base = format!("http://{address}");
        Self { base, address, client: Client::new(), stop: Some(stop), task, _folder: folder }
    }

    /// The address, without a path.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) async fn chatty() -> Self {
        Self::with(|settings, folder| {
            let file = folder.join("template.jinja");
            std::fs::write(&file, TEMPLATE).unwrap();
            settings.chat_template = Some(file);
        })
        .await
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: impl Into<Body>) -> Response {
        let request = self.client.request(method, format!("{}{path}", self.base)).body(body);
        request.send().await.unwrap()
    }

    pub(crate) async fn send_with(&self, path: &str, body: &Value, header: (&str, &str)) -> Response {
        let request = self.client.post(format!("{}{path}", self.base)).header(header.0, header.1);
        request.body(body.to_string()).send().await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let response = self.send(Method::GET, path, "").await;
        (response.status(), serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default())
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let response = self.send(Method::POST, path, body.to_string()).await;
        (response.status(), response.json().await.unwrap())
    }

    /// An answer that must be there.
    pub(crate) async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{body}: {answer}");
        answer
    }

    pub(crate) async fn complete(&self, body: Value) -> Value {
        self.ok("/v1/completions", &body).await
    }

    /// The one choice of a completion.
    pub(crate) async fn choice(&self, body: Value) -> Value {
        let mut answer = self.complete(body).await;
        let choices = answer["choices"].as_array_mut().unwrap();
        assert_eq!(choices.len(), 1);
        choices.remove(0)
    }

    /// All events of a stream; the last one must be `[DONE]`, and is left out.
    pub(crate) async fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let response = self.send(Method::POST, path, body.to_string()).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        let mut events: Vec<&str> = text.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Starts a stream that goes on until the context is full, and waits for its first event.
    pub(crate) async fn endless(&self) -> BoxStream<'static, reqwest::Result<()>> {
        let body = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "stream": true});
        let response = self.send(Method::POST, "/v1/completions", body.to_string()).await;
        assert_eq!(response.status(), StatusCode::OK);
        let mut stream = response.bytes_stream().map(|bytes| bytes.map(|_| ())).boxed();
        stream.next().await.unwrap().unwrap();
        stream
    }

    /// A metric's value: the line that begins with `start` and has all of `labels`.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let text = self.send(Method::GET, "/metrics", "").await.text().await.unwrap();
        let line = text.lines().find(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'))
                && labels.iter().all(|label| line.contains(label))
        });
        line.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    /// Waits until the metric has the value.
    pub(crate) async fn until(&self, name: &str, labels: &[&str], value: f64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.metric(name, labels).await != Some(value) {
            assert!(Instant::now() < deadline, "{name} {labels:?} does not become {value}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The signal to stop.
    pub(crate) fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits for the end after [`stop`](Self::stop).
    pub(crate) async fn ended(self) {
        self.task.await.unwrap().unwrap();
    }
}
