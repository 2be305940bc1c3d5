//! Streams completions, and notes when their pieces arrive.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde::Deserialize;
use serde_json::json;

use super::super::args::HttpBench;
use super::Answer;

/// Why a server cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum HttpBenchError {
    /// The address is no base of other addresses.
    #[error("--url {0}: not an address of a server")]
    Url(reqwest::Url),
    /// The server cannot be reached, or broke the connection.
    #[error("{url}: {source}")]
    Request {
        /// What was asked for.
        url: reqwest::Url,
        /// Why.
        source: reqwest::Error,
    },
    /// The server refused a request.
    #[error("{url}: {status}: {body}")]
    Refused {
        /// What was asked for.
        url: reqwest::Url,
        /// The status.
        status: reqwest::StatusCode,
        /// What the server said.
        body: String,
    },
    /// The server reports no model.
    #[error("{0} names no model; use --served-model")]
    NoModel(reqwest::Url),
    /// A piece of the stream is not what an OpenAI-style server sends.
    #[error("a piece of the stream cannot be read: {source}: {piece}")]
    Piece {
        /// The piece.
        piece: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The stream ended without saying how many tokens it had.
    #[error("the stream ended without usage (stream_options.include_usage)")]
    NoUsage,
}

/// A server and a model of it.
pub(super) struct Client {
    http: reqwest::Client,
    completions: reqwest::Url,
    api_key: Option<String>,
    model: String,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<ModelName>,
}

#[derive(Deserialize)]
struct ModelName {
    id: String,
}

#[derive(Deserialize)]
struct Piece {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<usize>,
}

impl Client {
    /// Asks for the model's name, unless it was given.
    pub(super) async fn connect(bench: &HttpBench) -> Result<Self, HttpBenchError> {
        let at = |path: &str| {
            let mut url = bench.url.clone();
            url.path_segments_mut()
                .map_err(|()| HttpBenchError::Url(bench.url.clone()))?
                .pop_if_empty()
                .extend(["v1", path]);
            Ok::<_, HttpBenchError>(url)
        };
        let mut client = Self {
            http: reqwest::Client::builder()
                .tcp_nodelay(true)
                .build()
                .map_err(|source| HttpBenchError::Request { url: bench.url.clone(), source })?,
            completions: at("completions")?,
            api_key: bench.api_key.clone(),
            model: String::new(),
        };
        client.model = match &bench.model {
            Some(name) => name.clone(),
            None => client.first_model(at("models")?).await?,
        };
        Ok(client)
    }

    async fn first_model(&self, url: reqwest::Url) -> Result<String, HttpBenchError> {
        let models = self.send(self.http.get(url.clone()), &url).await?.json::<Models>().await;
        let models = models.map_err(|source| HttpBenchError::Request { url: url.clone(), source })?;
        models.data.into_iter().next().map(|model| model.id).ok_or(HttpBenchError::NoModel(url))
    }

    async fn send(
        &self,
        request: reqwest::RequestBuilder,
        url: &reqwest::Url,
    ) -> Result<reqwest::Response, HttpBenchError> {
        let request = match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let failed = |source| HttpBenchError::Request { url: url.clone(), source };
        let response = request.send().await.map_err(failed)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.text().await.map_err(failed)?;
        Err(HttpBenchError::Refused { url: url.clone(), status, body })
    }

    /// Streams a greedy answer of `tokens` tokens.
    pub(super) async fn complete(&self, prompt: &str, tokens: usize) -> Result<Answer, HttpBenchError> {
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let start = Instant::now();
        let url = &self.completions;
        let response = self.send(self.http.post(url.clone()).json(&body), url).await?;
        let mut stream = response.bytes_stream();
        let mut events = Events::default();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|source| HttpBenchError::Request { url: url.clone(), source })?;
            events.receive(&bytes, start.elapsed())?;
        }
        events.answer()
    }
}

/// Server-sent events, as far as they have arrived.
#[derive(Default)]
struct Events {
    /// The beginning of a line whose end has not arrived.
    rest: Vec<u8>,
    arrivals: Vec<Duration>,
    usage: Option<Usage>,
}

impl Events {
    fn receive(&mut self, bytes: &[u8], now: Duration) -> Result<(), HttpBenchError> {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.rest.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.rest);
                self.line(&String::from_utf8_lossy(&line), now)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &str, now: Duration) -> Result<(), HttpBenchError> {
        let Some(piece) = line.strip_prefix("data:").map(str::trim) else { return Ok(()) };
        if piece == "[DONE]" {
            return Ok(());
        }
        let Piece { choices, usage } = serde_json::from_str(piece)
            .map_err(|source| HttpBenchError::Piece { piece: piece.to_owned(), source })?;
        if choices.iter().any(|choice| !choice.text.is_empty()) {
            self.arrivals.push(now);
        }
        self.usage = usage.or(self.usage.take());
        Ok(())
    }

    fn answer(self) -> Result<Answer, HttpBenchError> {
        let usage = self.usage.ok_or(HttpBenchError::NoUsage)?;
        let Usage { prompt_tokens, completion_tokens, prompt_tokens_details } = usage;
        let cached_tokens = prompt_tokens_details.and_then(|details| details.cached_tokens);
        Ok(Answer { arrivals: self.arrivals, prompt_tokens, cached_tokens, completion_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_however_they_are_cut() {
        let text = "data: {\"choices\":[{\"text\":\"é\"}],\"usage\":null}\n\n: ping\n\
                    data: {\"choices\":[{\"text\":\"\"}]}\r\n\r\n\
                    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\
                    \"prompt_tokens_details\":{\"cached_tokens\":1}}}\n\ndata: [DONE]\n\n";
        for size in 1..text.len() {
            let mut events = Events::default();
            for (at, bytes) in (0..).zip(text.as_bytes().chunks(size)) {
                events.receive(bytes, Duration::from_millis(at)).unwrap();
            }
            let answer = events.answer().unwrap();
            assert_eq!((answer.arrivals.len(), answer.prompt_tokens, answer.completion_tokens), (1, 3, 2));
            assert_eq!(answer.cached_tokens, Some(1));
        }
        assert!(matches!(Events::default().answer(), Err(HttpBenchError::NoUsage)));
        let broken = Events::default().line("data: {", Duration::ZERO).unwrap_err().to_string();
        assert!(broken.contains("data") || broken.ends_with('{'), "{broken}");
    }
}
