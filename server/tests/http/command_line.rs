//! The program `mxserve`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use crate::support::MODEL;

fn mxserve(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxserve"));
    command.args(arguments).env_remove("MXSERVE_PORT").stdin(Stdio::null());
    command
}

/// One line that begins with `error: ` and exit code 1.
fn refused(output: &Output) -> String {
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    // A path or a reason that stands there twice was printed by an error and by its source.
    let parts: Vec<&str> = error.trim_end().split(": ").collect();
    for (index, part) in parts.iter().enumerate() {
        assert!(!parts[..index].contains(part), "'{part}' twice: {error}");
    }
    error.strip_prefix("error: ").unwrap_or_else(|| panic!("{error}")).trim_end().to_owned()
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.toml");
    fs::write(&file, "port = 1\nmax_num_seqs = 2\nmax_model_len = 3\n").unwrap();
    let output = mxserve(&["check-config", "--config", file.to_str().unwrap(), "--port", "5"])
        .env("MXSERVE_PORT", "6")
        .env("MXSERVE_MAX_NUM_SEQS", "7")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let out = String::from_utf8(output.stdout).unwrap();
    for (key, source) in [
        ("port", "--port"),
        ("max_num_seqs", "MXSERVE_MAX_NUM_SEQS"),
        ("max_model_len", file.to_str().unwrap()),
        ("max_connections", "default"),
    ] {
        let line = out.lines().find(|line| line.starts_with(key)).unwrap();
        assert_eq!(line.split_once("  # ").unwrap().1, source, "{line}");
    }
    let settings: config::Settings = toml::from_str(&out).unwrap();
    assert_eq!((settings.port, settings.max_num_seqs, settings.max_model_len), (Some(5), Some(7), Some(3)));
}

#[test]
fn the_port_of_a_service_of_kubernetes_is_ignored() {
    for arguments in [&["check-config"][..], &["check-config", "--port", "5"]] {
        let output = mxserve(arguments).env("MXSERVE_PORT", "tcp://10.0.0.1:8000").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let expected =
            if arguments.len() == 1 { ["port = 8000 ", "# default"] } else { ["port = 5 ", "# --port"] };
        let out = String::from_utf8(output.stdout).unwrap();
        let line = out.lines().find(|line| line.starts_with("port")).unwrap();
        assert!(line.starts_with(expected[0]) && line.ends_with(expected[1]), "{line}");
    }
    let output = mxserve(&[]).env("MXSERVE_PORT", "tcp://10.0.0.1:8000").output().unwrap();
    assert!(refused(&output).contains("MODEL"));
    let output = mxserve(&["check-config"]).env("MXSERVE_PORT", "udp://10.0.0.1").output().unwrap();
    assert!(!output.status.success());
}

#[test]
fn api_keys_are_not_printed_and_that_is_said() {
    let output = mxserve(&["check-config", "--api-key", "hush", "--host", "localhost"]).output().unwrap();
    let (out, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(
        out.contains("host = \"127.0.0.1\"") && error.contains("API keys are not printed"),
        "{out}{error}"
    );
    assert!(!out.contains("hush") && !error.contains("hush"), "{out}{error}");
}

#[test]
fn check_config_finds_everything_that_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("keys.txt"), "# none\n").unwrap();
    fs::write(path("template.jinja"), "{% for %}").unwrap();
    let check = |arguments: &[&str]| {
        let output = mxserve(&[&["check-config"], arguments].concat()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, remarks) = check(&[]);
    assert_eq!((code, remarks.as_str()), (Some(0), "note: no model was named, so none was checked\n"));
    let (code, remarks) = check(&["/no/such/model"]);
    assert!(code == Some(0) && remarks.contains("/no/such/model: not here"), "{remarks}");
    assert_eq!(check(&[MODEL]), (Some(0), String::new()));

    let (code, remarks) = check(
        &[
            &["--api-key-file", path("keys.txt").as_str(), "--chat-template", &path("template.jinja")][..],
            &["--ssl-certfile", &path("none.pem"), "--ssl-keyfile", &path("none.pem")],
            &["--gpu-memory-utilization", "0.5", "--device", "cpu"],
        ]
        .concat(),
    );
    assert_eq!(code, Some(1));
    for word in ["keys.txt: no key", "--chat-template: ", "--ssl-certfile: ", "gpu_memory_utilization: "] {
        assert!(
            remarks.lines().any(|line| line.starts_with("error: ") && line.contains(word)),
            "{word}: {remarks}"
        );
    }
    // A model that is there is opened.
    let (code, remarks) = check(&[folder.path().to_str().unwrap()]);
    assert!(code == Some(1) && remarks.contains("config.json"), "{remarks}");
    fs::write(path("server.toml"), "max_seqs = 1\n").unwrap();
    let (code, remarks) = check(&["--config", &path("server.toml")]);
    assert!(code == Some(1) && remarks.contains("did you mean `max_num_seqs`?"), "{remarks}");
    assert_eq!(check(&["--max-seqs", "1"]).0, Some(2));
}

#[test]
fn what_cannot_work_is_one_line_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let missing_config = format!("{empty}/none.toml");
    let cases: [(&[&str], &str); 11] = [
        (&["/no/such/folder"], "/no/such/folder"),
        (&[file.to_str().unwrap()], "not a folder"),
        (&[empty], "config.json"),
        (&[], "MODEL"),
        (&[MODEL, "--config", &missing_config], "none.toml"),
        (&["demo", MODEL], "own model"),
        (&[MODEL, "--threads", "1025"], "1024"),
        (&[MODEL, "--device", "cuda:64"], "cuda:64 is not available"),
        (&[MODEL, "--tensor-parallel-size", "2"], "tensor_parallel_size"),
        (&[MODEL, "--gpu-memory-utilization", "0.9"], "gpu_memory_utilization"),
        (&[MODEL, "--max-model-len", "4096"], "max_model_len"),
    ];
    for (arguments, word) in cases {
        // A server may be running on the default port.
        let error = refused(&mxserve(arguments).env("MXSERVE_PORT", "0").output().unwrap());
        assert!(error.contains(word), "{arguments:?}: {error}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let error = refused(&mxserve(&[MODEL, "--host", "127.0.0.1", "--port", &port]).output().unwrap());
    assert!(error.contains(&port) && error.contains("in use"), "{error}");
}

#[test]
fn it_says_what_it_serves_and_stops_at_sigterm() {
    let mut server =
        mxserve(&[MODEL, "--host", "127.0.0.1", "--port", "0", "--kv-cache-memory-bytes", "16777216"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
    let lines: Vec<String> = BufReader::new(server.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .take_while(|line| !line.starts_with("serving"))
        .collect();
    assert!(lines[0].contains("rustdoc-6m"), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("q_proj+k_proj+v_proj")), "{lines:?}");
    assert!(lines.iter().any(|line| line.trim_start().starts_with("kv_cache")), "{lines:?}");
    let killed = Command::new("kill").arg(server.id().to_string()).status().unwrap();
    assert!(killed.success());
    assert_eq!(server.wait().unwrap().code(), Some(0));
}
