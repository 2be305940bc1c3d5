//! The program as a process of its own, spoken to through plain sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::support::MODEL;

/// A running `mxserve`, its address and its log.
pub(crate) struct Process {
    child: Child,
    address: String,
    log: NamedTempFile,
}

impl Process {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let log = NamedTempFile::new().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_mxserve"))
            .args([MODEL, "--host", "127.0.0.1", "--port", "0", "--kv-cache-memory-bytes", "16777216"])
            .args(arguments)
            .env_remove("MXSERVE_PORT")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let address = lines
            .filter_map(|line| line.strip_prefix("serving  http://").map(str::to_owned))
            .find_map(|rest| rest.split_once('/').map(|(address, _)| address.to_owned()));
        Self { child, address: address.expect("it serves"), log }
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Sends a request; the answer is read until the server closes.
    pub(crate) fn send(&self, method: &str, path: &str, key: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    pub(crate) fn get(&self, path: &str, key: &str) -> String {
        text_of(self.send("GET", path, key, ""))
    }

    /// A stream of a few hundred tokens that has begun.
    pub(crate) fn stream(&self) -> (TcpStream, String) {
        let body = r#"{"prompt": "a", "max_tokens": 400, "ignore_eos": true, "stream": true}"#;
        let mut stream = self.send("POST", "/v1/completions", "", body);
        let mut begun = String::new();
        while !begun.contains("data: ") {
            let mut part = [0; 512];
            let length = stream.read(&mut part).unwrap();
            assert_ne!(length, 0, "{begun}");
            begun.push_str(&String::from_utf8_lossy(&part[..length]));
        }
        (stream, begun)
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    /// The exit code.
    pub(crate) fn ended(mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.child.kill().unwrap();
        panic!("it does not end");
    }
}

pub(crate) fn text_of(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}
