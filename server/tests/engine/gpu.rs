//! The engine on a GPU: recorded steps, padding, and clients that hear of a step while the next one runs. Without a GPU
//! these tests say that they are skipped.

#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

use super::*;

const GPU: Device = Device::Cuda { ordinal: 0, strict: false };

fn gpu(options: EngineOptions) -> Option<EngineHandle> {
    match GPU.check() {
        Ok(()) => Some(EngineHandle::start(options, Box::new(()), || load_on(GPU)).expect("the model loads")),
        Err(error) => {
            println!("SKIPPED: {error}");
            None
        }
    }
}

/// Requests whose prompts make one small step together, and none is cut: the rows of a step decide which kernels
/// compute it.
fn requests() -> Vec<GenerateRequest> {
    let requests = (0..14).map(|index| {
        let sampling = match index % 3 {
            0 => Sampling { temperature: 0.0, ..Sampling::default() },
            1 => Sampling { seed: index as u64, top_p: 0.9, ..Sampling::default() },
            _ => Sampling { seed: index as u64, repetition_penalty: 1.2, ..Sampling::default() },
        };
        let mut request = GenerateRequest { sampling, ..request(1 + index % 3, 10 + 5 * index) };
        request.prompt = text_tokens()[31 * index..][..1 + index % 3].to_vec();
        request.logprobs = (index % 4 == 0).then_some(3);
        request
    });
    requests.collect()
}

#[test]
fn a_crowd_changes_nothing_and_the_end_is_told() {
    let Some(engine) = gpu(options(200)) else { return };
    let alone: Vec<Heard> = requests().into_iter().map(|request| run(&engine, request)).collect();
    let again: Vec<Heard> = requests().into_iter().map(|request| run(&engine, request)).collect();
    assert_eq!(alone, again);
    for round in 0..3 {
        // In another order, so that places in the batch and blocks differ; the batch shrinks as sequences end.
        let mut crowd = requests();
        crowd.rotate_left(round);
        let channels = engine.submit_all(crowd).unwrap();
        let mut heard: Vec<Heard> = channels.into_iter().map(hear).collect();
        heard.rotate_right(round);
        for (index, (heard, alone)) in heard.iter().zip(&alone).enumerate() {
            assert!(alone.end.is_some(), "request {index}");
            assert_eq!(heard, alone, "round {round}, request {index}");
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
}

#[test]
fn greedy_text_is_the_cpus_but_for_near_ties() {
    let Some(engine) = gpu(EngineOptions { max_num_batched_tokens: 512, ..options(400) }) else { return };
    let cpu = start(options(400));
    let (mut same, mut all) = (0, 0);
    for index in 0..16 {
        let mut request = request(20 + 9 * index, 48);
        request.prompt = text_tokens()[200 * index..][..20 + 9 * index].to_vec();
        let (gpu, cpu) = (run(&engine, request.clone()), run(&cpu, request));
        same += gpu.tokens.iter().zip(&cpu.tokens).take_while(|(gpu, cpu)| gpu == cpu).count();
        all += cpu.tokens.len();
    }
    println!("{same} of {all} tokens before the first that differs");
    // Activations are BF16 here and F32 there: where two tokens are almost as likely, either may come.
    assert!(same * 10 >= all * 7, "{same} of {all} tokens");
}

#[test]
fn a_full_cache_preempts_and_those_who_leave_free_their_places() {
    let Some(engine) = gpu(options(14)) else { return };
    let mut channels = engine.submit_all(requests()).unwrap();
    channels.truncate(9);
    for (index, heard) in channels.into_iter().map(hear).enumerate() {
        assert_eq!(heard.tokens.len(), 10 + 5 * index, "request {index}");
    }
    assert_eq!(run(&engine, request(8, 4)).tokens.len(), 4);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
}

#[test]
fn the_cache_takes_its_share_of_the_device() {
    let share = |share| EngineOptions { kv_cache: KvCacheSize::DeviceShare(share), ..options(0) };
    let Some(engine) = gpu(share(0.5)) else { return };
    let kv_bytes = engine.info().memory.bytes(kernels::Component::KvCache) as f64;
    engine.shutdown();
    let total = kernels::open(GPU).unwrap().device_memory().unwrap().total_bytes as f64;
    assert!((0.4..0.5).contains(&(kv_bytes / total)), "{kv_bytes} of {total}");
    let too_little = EngineHandle::start(share(0.0001), Box::new(()), || load_on(GPU)).unwrap_err();
    assert!(too_little.to_string().contains("gpu_memory_utilization"), "{too_little}");
}

#[test]
fn speculation_is_refused_where_it_would_not_be_exact() {
    if gpu(options(8)).is_none() {
        return;
    }
    let lookup = NgramLookup { num_speculative_tokens: 4, max: 3, min: 2 };
    let speculating = EngineOptions { speculation: Some(lookup), ..options(8) };
    let error = EngineHandle::start(speculating, Box::new(()), || load_on(GPU)).unwrap_err();
    assert!(error.to_string().starts_with("speculative_config: "), "{error}");
}
