//! The study as a page: findings, tables and charts.

use kernels::mx::{ElementType, ScaleRounding};

use super::Study;
use super::design::{BLOCKS, Design, Organisation, Rounding, Symmetry};
use super::findings::{FOUR_BITS, short};
use super::measure::{Errors, Operand};
use crate::report::chart::{Chart, Series};
use crate::report::page::{Cell, Page};

const fn name(operand: Operand) -> &'static str {
    match operand {
        Operand::Weight => "Weights",
        Operand::Activation => "Activations",
    }
}

fn decibels(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"))
}

impl Study {
    /// The report, in one file that needs nothing else.
    pub fn html(&self) -> String {
        let mut page = Page::new(&format!("Microscaling formats on {}", self.model));
        self.introduction(&mut page);
        self.formats(&mut page);
        self.scale_rules(&mut page);
        self.blocks(&mut page);
        self.organisations(&mut page);
        self.element_rounding(&mut page);
        self.block_spreads(&mut page);
        page.finish()
    }

    fn introduction(&self, page: &mut Page) {
        let layers: Vec<_> = self.layers.iter().map(usize::to_string).collect();
        let activations = match &self.text {
            Some(text) => format!(
                "{} elements of the activations that the first 512 tokens of {text} cause",
                self.activation_elements
            ),
            None => "no activations, as no text was given".to_owned(),
        };
        page.paragraph(&format!(
            "Measured on samples: up to 128 neighbouring rows of every linear module of decoder layers {}, {} weight \
             elements, and {activations}. {} designs, {:.0} s. SQNR is 10 log10 of signal over error energy, the mean \
             over tensors; output SQNR is that of the products with the other, unquantized factor. More is better.",
            layers.join(", "),
            self.weight_elements,
            self.outcomes.len(),
            self.seconds,
        ));
        page.heading("What was published, and what holds here");
        let rows: Vec<_> = (self.findings.iter())
            .map(|f| vec![Cell::new(&f.claim), Cell::new(f.verdict.name()), Cell::new(&f.figures)])
            .collect();
        page.text_table(
            "Findings of “An Empirical Study of Microscaling Formats for Low-Precision LLM Training”",
            &["finding", "here", "figures"],
            &rows,
        );
    }

    fn formats(&self, page: &mut Page) {
        page.heading("The formats as checkpoints have them");
        let mut rows = Vec::new();
        for element in ElementType::ALL {
            let design = Design::ocp(element);
            let mut row = vec![
                Cell::new(element.spec().name),
                Cell::new(design.scale_rounding.name()),
                Cell::new(format!("{:.2}", design.bits_per_element())),
            ];
            for operand in [Operand::Weight, Operand::Activation] {
                let errors = self.errors(operand, &design);
                let rmse = |errors: &Errors| format!("{:.3e}", errors.rmse);
                row.push(Cell::new(errors.map_or_else(|| "–".to_owned(), rmse)));
                row.push(Cell::new(decibels(errors.map(|errors| errors.sqnr_db))));
                row.push(Cell::new(decibels(errors.and_then(|errors| errors.output_sqnr_db))));
            }
            rows.push(row);
        }
        let header = [
            "format",
            "scale rule",
            "bits",
            "weights: RMSE",
            "SQNR, dB",
            "output",
            "activations: RMSE",
            "SQNR, dB",
            "output",
        ];
        page.table("Blocks of 32 along K, one scale, nearest", &header, &rows);
    }

    fn scale_rules(&self, page: &mut Page) {
        page.heading("Scale rule");
        for operand in self.operands() {
            let at = |element, scale_rounding| {
                self.sqnr_db(operand, &Design { scale_rounding, ..Design::ocp(element) })
            };
            let rows: Vec<_> = (ElementType::ALL.iter())
                .map(|&element| {
                    let values = ScaleRounding::ALL.map(|rule| at(element, rule));
                    let best = values.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
                    let cells =
                        values.iter().map(|&value| Cell::marked(decibels(value), value == Some(best)));
                    std::iter::once(Cell::new(short(element))).chain(cells).collect()
                })
                .collect();
            let header: Vec<_> =
                std::iter::once("element").chain(ScaleRounding::ALL.map(ScaleRounding::name)).collect();
            let caption = format!("{}: SQNR in dB by scale rule, blocks of 32 along K", name(operand));
            page.table(&caption, &header, &rows);
            let series = (ScaleRounding::ALL.iter().enumerate()).map(|(colour, &rule)| Series {
                name: rule.to_string(),
                values: FOUR_BITS.map(|element| at(element, rule)).into(),
                colour,
                dash: 0,
            });
            let chart = Chart {
                caption: &format!("{}: scale rules of the 4-bit types", name(operand)),
                x_label: "element",
                unit: "dB",
                categories: FOUR_BITS.map(short).into(),
                series: series.collect(),
            };
            page.raw(&chart.bars());
        }
    }

    fn blocks(&self, page: &mut Page) {
        page.heading("Block size, and one scale or two");
        page.paragraph(
            "Two scales: one for the positive, one for the negative values of a block. Offset: the middle of the \
             block's range is subtracted first. Neither is an OCP format. Each point has its format's default scale rule.",
        );
        let categories: Vec<_> = BLOCKS.iter().map(usize::to_string).collect();
        for operand in self.operands() {
            let over_blocks = |element, symmetry| -> Vec<_> {
                let design = |block| Design { block, symmetry, ..Design::ocp(element) };
                BLOCKS.iter().map(|&block| self.sqnr_db(operand, &design(block))).collect()
            };
            let series = (ElementType::ALL.iter().enumerate()).map(|(colour, &element)| Series {
                name: short(element),
                values: over_blocks(element, Symmetry::Symmetric),
                colour,
                dash: 0,
            });
            let chart = Chart {
                caption: &format!("{}: SQNR by block size, one scale", name(operand)),
                x_label: "block size k (1xk)",
                unit: "dB",
                categories: categories.clone(),
                series: series.collect(),
            };
            page.raw(&chart.lines());
            let series = (FOUR_BITS.iter().enumerate()).flat_map(|(colour, &element)| {
                (Symmetry::ALL.iter().enumerate()).map(move |(dash, &symmetry)| Series {
                    name: format!("{}, {}", short(element), symmetry.name()),
                    values: over_blocks(element, symmetry),
                    colour,
                    dash,
                })
            });
            let chart = Chart {
                caption: &format!("{}: symmetric and asymmetric blocks of the 4-bit types", name(operand)),
                series: series.collect(),
                ..chart
            };
            page.raw(&chart.lines());
        }
    }

    fn organisations(&self, page: &mut Page) {
        page.heading("Block shape");
        page.paragraph(
            "1xk: along K, as checkpoints have it. kx1: one input channel of k outputs (weights) or of k tokens \
             (activations). kxk: tiles.",
        );
        for operand in self.operands() {
            let at = |element, organisation| {
                self.sqnr_db(operand, &Design { organisation, ..Design::ocp(element) })
            };
            let series = (Organisation::ALL.iter().enumerate()).map(|(colour, &organisation)| Series {
                name: organisation.name().to_owned(),
                values: ElementType::ALL.map(|element| at(element, organisation)).into(),
                colour,
                dash: 0,
            });
            let chart = Chart {
                caption: &format!("{}: SQNR by block shape, k = 32", name(operand)),
                x_label: "element",
                unit: "dB",
                categories: ElementType::ALL.map(short).into(),
                series: series.collect(),
            };
            page.raw(&chart.bars());
        }
    }

    fn element_rounding(&self, page: &mut Page) {
        page.heading("Element rounding");
        let mut rows = Vec::new();
        for element in ElementType::ALL {
            let mut row = vec![Cell::new(short(element))];
            for operand in [Operand::Weight, Operand::Activation] {
                for rounding in [Rounding::Nearest, Rounding::Stochastic] {
                    let errors = self.errors(operand, &Design { rounding, ..Design::ocp(element) });
                    row.push(Cell::new(decibels(errors.map(|errors| errors.sqnr_db))));
                    row.push(Cell::new(decibels(errors.and_then(|errors| errors.output_sqnr_db))));
                }
            }
            rows.push(row);
        }
        let header = [
            "element",
            "weights: nearest",
            "output",
            "stochastic",
            "output",
            "activations: nearest",
            "output",
            "stochastic",
            "output",
        ];
        page.table("SQNR in dB, blocks of 32 along K", &header, &rows);
    }

    fn block_spreads(&self, page: &mut Page) {
        page.heading("How far the magnitudes of a block lie apart");
        for operand in self.operands() {
            let of_operand = || self.spreads.iter().filter(|spread| spread.operand == operand);
            let rows: Vec<_> = of_operand()
                .filter(|spread| spread.block == 32)
                .map(|spread| {
                    let shares = spread.share_above.map(|share| Cell::new(format!("{:.1} %", 100.0 * share)));
                    let names = [Cell::new(&spread.modules), Cell::new(spread.organisation.name())];
                    let median = Cell::new(format!("{:.0}", spread.median));
                    names.into_iter().chain(shares).chain([median]).collect()
                })
                .collect();
            let header = ["modules", "shape", "over 2x", "over 10x", "over 100x", "median ratio"];
            page.table(&format!("{}: blocks of k = 32", name(operand)), &header, &rows);
            let rows =
                |block| of_operand().filter(move |s| s.block == block && s.organisation == Organisation::Row);
            let kinds: Vec<_> = rows(32).map(|spread| spread.modules.clone()).collect();
            let series = BLOCKS.iter().enumerate().map(|(colour, &block)| Series {
                name: format!("k = {block}"),
                values: rows(block).map(|spread| Some(100.0 * spread.share_above[2])).collect(),
                colour,
                dash: 0,
            });
            let chart = Chart {
                caption: &format!(
                    "{}: blocks along K whose magnitudes lie over 100 times apart",
                    name(operand)
                ),
                x_label: "modules",
                unit: "%",
                categories: kinds,
                series: series.collect(),
            };
            page.raw(&chart.bars());
        }
    }
}
