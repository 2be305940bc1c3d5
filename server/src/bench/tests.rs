//! Benchmarks of a model that is quick to run.

use clap::Parser;

use super::args::{Mode, OutputFormat};
use super::*;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    bench: BenchArgs,
}

fn parse(flags: &str) -> BenchArgs {
    let command = Command::try_parse_from(std::iter::once("bench").chain(flags.split_whitespace()));
    command.unwrap_or_else(|error| panic!("{error}")).bench
}

/// The records of an offline benchmark of the small test model.
fn records(flags: &str) -> Vec<serde_json::Value> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/rustdoc-6m");
    let Ok(Mode::Offline(bench)) = parse(&format!("{} {flags}", folder.display())).mode() else {
        panic!("{flags} is offline");
    };
    let mut out = Vec::new();
    offline::run(&bench, OutputFormat::Json, &mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

#[test]
fn every_combination_is_measured() {
    let records = records("-p 40 -n 3 --pg 8,2 -b 1,5 -d 0,20 -r 2 -t 1 --max-num-batched-tokens 16");
    let tests: Vec<String> = records
        .iter()
        .map(|record| format!("{} x{}", record["test"].as_str().unwrap(), record["batch"]))
        .collect();
    let expected = [
        "pp40 x1",
        "tg3 x1",
        "pp8+tg2 x1",
        "pp40 x5",
        "tg3 x5",
        "pp8+tg2 x5",
        "pp40 @ d20 x1",
        "tg3 @ d20 x1",
        "pp8+tg2 @ d20 x1",
        "pp40 @ d20 x5",
        "tg3 @ d20 x5",
        "pp8+tg2 @ d20 x5",
    ];
    assert_eq!(tests, expected);
    for record in &records {
        let rate = record["tokens_per_sec"]["median"].as_f64().unwrap();
        let seconds = record["seconds"].as_array().unwrap();
        assert!(rate > 0.0 && seconds.len() == 2, "{record}");
        // The median lies between the two repetitions, each of which computes all sequences' tokens.
        let tokens = record["batch"].as_u64().unwrap()
            * (record["n_prompt"].as_u64().unwrap() + record["n_gen"].as_u64().unwrap());
        let rates: Vec<f64> = seconds.iter().map(|secs| tokens as f64 / secs.as_f64().unwrap()).collect();
        let (low, high) = (rates[0].min(rates[1]), rates[0].max(rates[1]));
        assert!(rate >= low * 0.999 && rate <= high * 1.001, "{rate} of {rates:?}");
    }
    let bytes = |index: usize| records[index]["weight_bytes_per_token"].as_f64();
    assert_eq!(bytes(0), None);
    let has_read = |record: &serde_json::Value| record["read_bytes_per_sec"].is_f64();
    assert_eq!([0, 1, 2].map(|index| has_read(&records[index])), [false, true, false]);
    assert_eq!(bytes(1), bytes(4).map(|of_five| of_five * 5.0));
}

#[test]
fn mistakes_are_said_plainly() {
    for (flags, expected) in [
        ("", "--shape NAME"),
        ("--shape llama-1b -b 0", "--batch must be at least 1"),
        ("--shape llama-1b -r 0", "--repetitions must be at least 1"),
        ("--url http://localhost:1 --output-len 0", "--output-len must be at least 1"),
    ] {
        let error = parse(flags).mode().err().unwrap().to_string();
        assert!(error.contains(expected), "{flags}: {error}");
    }
    for flags in ["--shape llama-9b", "--format mxfp4", "--concurrency 2", "--shape llama-1b --url http://a"]
    {
        let flags = std::iter::once("bench").chain(flags.split_whitespace());
        assert!(Command::try_parse_from(flags).is_err());
    }
}
