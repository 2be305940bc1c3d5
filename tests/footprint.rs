//! What a format saves, as the gauges say it.

use converter::plan::Recipe;

use crate::common::{Server, block_on, converted, rustdoc};

/// Elements of the linear layers and of everything else in the tests' model.
fn parameters() -> (f64, f64) {
    let layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256;
    (f64::from(6 * layer), f64::from(4096 * 256 + 6 * 2 * 256 + 256))
}

#[test]
fn gauges_show_the_bits_of_the_format() {
    let (linear, rest) = parameters();
    for (format, bits) in [("mxfp4", 4.0), ("mxfp6", 6.0), ("mxfp8", 8.0), ("mxint8", 8.0), ("w4a6", 4.0)] {
        let (_folder, model) = converted(Recipe::new(format.parse().expect("a scheme")));
        let server = Server::start(&model, |_| ());
        block_on(async {
            assert_eq!(
                server.metric("mx_memory_bytes", "\"weights\"").await,
                linear * bits / 8.0,
                "{format}"
            );
            assert_eq!(server.metric("mx_memory_bytes", "\"scales\"").await, linear / 32.0, "{format}");
            assert_eq!(server.metric("mx_weight_bits_per_parameter", "").await, bits + 0.25, "{format}");
            // Norms are held in F32, the embedding in BF16.
            let unquantized = server.metric("mx_memory_bytes", "\"unquantized\"").await;
            assert!((unquantized / (rest * 2.0) - 1.0).abs() < 0.01, "{format}: {unquantized}");
            let ratio = server.metric("mx_footprint_ratio", "").await;
            let expected = 2.0 * (linear + rest) / (linear * (bits + 0.25) / 8.0 + unquantized);
            assert!((ratio - expected).abs() < 0.01, "{format}: {ratio}, not {expected}");
        });
    }
    let server = Server::start(&rustdoc(), |_| ());
    assert_eq!(block_on(server.metric("mx_memory_bytes", "\"weights\"")), 0.0);
}
