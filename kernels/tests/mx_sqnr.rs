//! Signal to quantization noise of every format and scale rule, against tables of an independent implementation.

use std::collections::HashMap;

use kernels::mx::{Block, Cast, ElementRounding, MxFormat, ScaleRounding, Values, quantize_rows};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/sqnr.csv");
const SAMPLES: usize = 1 << 20;

/// Rows without a standard deviation of their own were rounded to 0.01 dB; they get at least this tolerance.
const LEAST_TOLERANCE_DB: f64 = 0.05;

/// SplitMix64.
struct Generator(u64);

impl Generator {
    /// Uniform in (0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Box and Muller's transform.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn laplace(&mut self) -> f64 {
        let magnitude = -self.uniform().ln();
        if self.uniform() < 0.5 { magnitude } else { -magnitude }
    }

    /// Student's t with four degrees of freedom: a normal over the root of a chi-square per degree of freedom.
    fn student_t4(&mut self) -> f64 {
        let chi_square = -2.0 * (self.uniform() * self.uniform()).ln();
        self.normal() / (chi_square / 4.0).sqrt()
    }

    fn samples(&mut self, distribution: &str) -> Vec<u8> {
        let draw: fn(&mut Self) -> f64 = match distribution {
            "normal" => Self::normal,
            "laplace" => Self::laplace,
            "t4" => Self::student_t4,
            other => panic!("{TABLE}: unknown distribution {other}"),
        };
        (0..SAMPLES).flat_map(|_| (draw(self) as f32).to_le_bytes()).collect()
    }
}

fn sqnr_db(cast: Cast, samples: &[u8]) -> f64 {
    let mut codes = vec![0; cast.format.code_bytes(SAMPLES)];
    let mut scales = vec![0; cast.format.scale_bytes(SAMPLES)];
    let values = Values::F32(samples);
    quantize_rows(cast, ElementRounding::NearestEven, values, 0, &mut codes, &mut scales)
        .expect("finite samples")
        .sqnr_db()
}

struct Row {
    distribution: String,
    cast: Cast,
    mean_db: f64,
    sd_db: Option<f64>,
}

fn table() -> Vec<Row> {
    let text = std::fs::read_to_string(TABLE).expect(TABLE);
    let lines = text.lines().filter(|line| !line.starts_with('#')).skip(1);
    let parse = |line: &str| {
        let [distribution, format, mode, block, mean_db, sd_db] =
            line.split(',').collect::<Vec<_>>().try_into().ok()?;
        let element = format.parse::<MxFormat>().ok()?.element;
        let block = Block::along_k(block.parse().ok()?)?;
        Some(Row {
            distribution: distribution.to_owned(),
            cast: Cast { format: MxFormat { element, block }, scale_rounding: mode.parse().ok()? },
            mean_db: mean_db.parse().ok()?,
            sd_db: if sd_db.is_empty() { None } else { Some(sd_db.parse().ok()?) },
        })
    };
    lines.map(|line| parse(line).unwrap_or_else(|| panic!("{TABLE}: {line}"))).collect()
}

#[test]
fn every_format_and_scale_rule_has_the_sqnr_of_the_reference() {
    let table = table();
    let sd_of = |row: &Row, scale_rounding| {
        let cast = Cast { scale_rounding, ..row.cast };
        let same = table.iter().find(|r| r.distribution == row.distribution && r.cast == cast);
        same.and_then(|r| r.sd_db).expect("a standard deviation")
    };
    let mut samples = HashMap::new();
    let mut failures = Vec::new();
    for row in &table {
        let samples = samples
            .entry(row.distribution.clone())
            .or_insert_with(|| Generator(2026).samples(&row.distribution));
        let measured_db = sqnr_db(row.cast, samples);
        let tolerance_db = match row.sd_db {
            Some(sd_db) => 4.0 * sd_db,
            None => (4.0 * sd_of(row, ScaleRounding::Even)).max(LEAST_TOLERANCE_DB),
        };
        let Row { distribution, cast, mean_db, .. } = row;
        if (measured_db - mean_db).abs() > tolerance_db {
            failures.push(format!(
                "{distribution} {} {}: {measured_db:.3} dB, expected {mean_db:.3} ± {tolerance_db:.3}",
                cast.format, cast.scale_rounding
            ));
        }
    }
    assert!(table.len() > 250, "{TABLE} lists every format, rule and block size");
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), table.len(), failures.join("\n"));
}
