//! `server.toml` is the documentation of the defaults: it must agree with the code.

use std::collections::BTreeSet;
use std::path::Path;

use clap::Args;
use config::{ConfigError, DeviceChoice, ServerConfig, Settings, SpeculativeConfig};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/server.toml");

/// Flags that say false to another key have none of their own.
fn keys_of_code() -> BTreeSet<String> {
    Settings::augment_args(clap::Command::new("test"))
        .get_arguments()
        .map(|argument| argument.get_id().to_string())
        .filter(|key| !key.starts_with("no_"))
        .collect()
}

/// Keys that are set, and keys that stand in a comment of the form `# key = value`.
fn keys_of_file(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let key = |line: &str| {
        line.split_once(" = ").map(|(key, _)| key.to_owned()).filter(|key| !key.contains([' ', '<', '`']))
    };
    let set = text.lines().filter(|line| !line.starts_with('#')).filter_map(key).collect();
    let commented = text.lines().filter_map(|line| line.strip_prefix("# ")).filter_map(key).collect();
    (set, commented)
}

#[test]
fn states_the_defaults() {
    let file = Settings::from_file(Path::new(FILE)).unwrap();
    let resolved = ServerConfig::resolve(file, Settings::default()).unwrap();
    assert_eq!(resolved, ServerConfig::default());
}

#[test]
fn names_every_key_and_sets_all_that_have_a_default() {
    let (set, commented) = keys_of_file(&std::fs::read_to_string(FILE).unwrap());
    assert_eq!(&set | &commented, keys_of_code());
    assert_eq!(&set & &commented, BTreeSet::new());
    // What the code has a fixed value for, the file sets. `threads` has a value that depends on the machine.
    let defaults = toml::Table::try_from(ServerConfig::default().to_settings()).unwrap();
    let fixed: BTreeSet<_> = defaults.keys().filter(|key| *key != "threads").cloned().collect();
    assert_eq!(set, fixed);
}

#[test]
fn the_commented_examples_are_valid() {
    let text = std::fs::read_to_string(FILE).unwrap();
    let (_, commented) = keys_of_file(&text);
    let examples: String = text
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .filter(|line| line.split_once(" = ").is_some_and(|(key, _)| commented.contains(key)))
        .map(|line| format!("{line}\n"))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("examples.toml");
    std::fs::write(&path, examples).unwrap();
    let examples = Settings::from_file(&path).unwrap();
    ServerConfig::resolve(examples, Settings::default()).unwrap();
}

#[test]
fn flags_win_over_the_file() {
    let file = Settings { port: Some(1), max_num_seqs: Some(2), ..Settings::default() };
    let flags = Settings { port: Some(3), ..Settings::default() };
    let resolved = ServerConfig::resolve(file, flags).unwrap();
    assert_eq!((resolved.port, resolved.max_num_seqs), (3, Some(2)));
    assert_eq!(resolved.max_num_queued_reqs, ServerConfig::default().max_num_queued_reqs);
}

#[test]
fn prefix_caching_is_switched_as_vllm_does() {
    use clap::FromArgMatches;
    let parse = |flags: &[&str]| {
        let command = Settings::augment_args(clap::Command::new("test"));
        let matches = command.try_get_matches_from(std::iter::once(&"test").chain(flags));
        matches.map(|matches| Settings::from_arg_matches(&matches).unwrap())
    };
    let off = Settings { enable_prefix_caching: Some(false), ..Settings::default() };
    for (file, flags, expected) in [
        (Settings::default(), &[][..], true),
        (Settings::default(), &["--no-enable-prefix-caching"], false),
        (Settings::default(), &["--enable-prefix-caching=false"], false),
        (off.clone(), &[], false),
        (off, &["--enable-prefix-caching"], true),
    ] {
        let resolved = ServerConfig::resolve(file, parse(flags).unwrap()).unwrap();
        assert_eq!(resolved.enable_prefix_caching, expected, "{flags:?}");
    }
    assert!(parse(&["--enable-prefix-caching", "--no-enable-prefix-caching"]).is_err());
}

#[test]
fn speculation_is_written_as_vllm_does() {
    let parsed: SpeculativeConfig =
        r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}"#.parse().unwrap();
    assert_eq!((parsed.num_speculative_tokens, parsed.lookup_lengths()), (4, (3, 3)));
    let said = |text: &str| Settings { speculative_config: text.parse().ok(), ..Settings::default() };
    let shown = toml::to_string(&said(r#"{"method": "ngram", "num_speculative_tokens": 2}"#)).unwrap();
    assert_eq!(
        toml::from_str::<Settings>(&shown).unwrap().speculative_config.unwrap().lookup_lengths(),
        (5, 5)
    );
    for text in [
        r#"{"method": "eagle", "num_speculative_tokens": 4}"#,
        r#"{"method": "ngram"}"#,
        r#"{"method": "ngram", "num_speculative_tokens": -1}"#,
        r#"{"method": "ngram", "num_speculative_tokens": 4, "model": "x"}"#,
        "ngram",
    ] {
        assert!(text.parse::<SpeculativeConfig>().is_err(), "{text}");
    }
    for text in [
        r#"{"method": "ngram", "num_speculative_tokens": 0}"#,
        r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 0}"#,
        r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3}"#,
    ] {
        let error = ServerConfig::resolve(Settings::default(), said(text)).unwrap_err();
        assert!(error.to_string().starts_with("speculative_config: "), "{error}");
    }
}

#[test]
fn what_was_resolved_can_be_said_again() {
    let said = Settings {
        model: Some("m".into()),
        api_key: Some(vec!["k".into()]),
        max_model_len: Some(128),
        disable_log_requests: Some(true),
        ..Settings::default()
    };
    let resolved = ServerConfig::resolve(Settings::default(), said).unwrap();
    assert!(!resolved.log_requests);
    assert_eq!(ServerConfig::resolve(Settings::default(), resolved.to_settings()).unwrap(), resolved);
}

#[test]
fn api_keys_are_not_shown() {
    let said = Settings { api_key: Some(vec!["hush".into()]), ..Settings::default() };
    assert!(!format!("{said:?}").contains("hush"));
    let resolved = ServerConfig::resolve(Settings::default(), said).unwrap();
    assert!(!format!("{resolved:?}").contains("hush"));
}

#[test]
fn refuses_and_names_the_key() {
    let d = Settings::default;
    let cases = [
        ("max_num_seqs", Settings { max_num_seqs: Some(0), ..d() }),
        ("threads", Settings { threads: Some(0), ..d() }),
        ("max_model_len", Settings { max_model_len: Some(1), ..d() }),
        ("served_model_name", Settings { served_model_name: Some(vec![String::new()]), ..d() }),
        ("tensor_parallel_size", Settings { tensor_parallel_size: Some(2), ..d() }),
        ("gpu_memory_utilization", Settings { gpu_memory_utilization: Some(1.5), ..d() }),
        ("gpu_memory_utilization", Settings { gpu_memory_utilization: Some(f64::NAN), ..d() }),
    ];
    for (key, said) in cases {
        let error = ServerConfig::resolve(d(), said).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{key}: ")), "{error}");
    }
}

#[test]
fn devices_have_names() {
    for (text, choice) in [
        ("auto", DeviceChoice::Auto),
        ("cpu", DeviceChoice::Cpu),
        ("cuda:0", DeviceChoice::Cuda { ordinal: 0 }),
        ("cuda:12", DeviceChoice::Cuda { ordinal: 12 }),
    ] {
        assert_eq!(text.parse(), Ok(choice));
        assert_eq!(choice.to_string(), text);
    }
    assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda { ordinal: 0 }));
    for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0"] {
        assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
    }
}

#[test]
fn a_bad_file_is_named_with_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    for (text, word) in [("prot = 1", "prot"), ("port = \"x\"", "port"), ("port = ", "bad.toml")] {
        std::fs::write(&path, text).unwrap();
        let error = Settings::from_file(&path).unwrap_err();
        assert!(matches!(error, ConfigError::Parse { .. }));
        assert!(error.to_string().contains(word) && error.to_string().contains("bad.toml"), "{error}");
    }
    let missing = Settings::from_file(&folder.path().join("none.toml")).unwrap_err();
    assert!(matches!(missing, ConfigError::Read { .. }));
}
