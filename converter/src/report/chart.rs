//! Charts as SVG inside HTML figures. Series differ in colour and in dashes or pattern of position; every mark has its
//! value as a tooltip, which is also what assistive technology reads.

use std::fmt::Write;

use super::page::escape;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;

/// Colours of the page's style sheet.
const COLOURS: usize = 8;

/// One line, or one bar in each category.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    /// In the legend.
    pub(crate) name: String,
    /// A value for each category; absent ones are left out.
    pub(crate) values: Vec<Option<f64>>,
    /// Index of the colour.
    pub(crate) colour: usize,
    /// Of a line: 0 is solid, others are dashed differently.
    pub(crate) dash: usize,
}

/// A chart over categories.
#[derive(Debug, Clone)]
pub(crate) struct Chart<'a> {
    /// Above the chart.
    pub(crate) caption: &'a str,
    /// Below the horizontal axis.
    pub(crate) x_label: &'a str,
    /// Unit of the values: `dB`.
    pub(crate) unit: &'a str,
    /// Along the horizontal axis.
    pub(crate) categories: Vec<String>,
    /// What is drawn.
    pub(crate) series: Vec<Series>,
}

impl Chart<'_> {
    /// Values joined by lines; the vertical axis spans them.
    pub(crate) fn lines(&self) -> String {
        let Some(scale) = self.scale(false) else { return String::new() };
        let mut svg = self.frame(&scale);
        for series in &self.series {
            let colour = series.colour % COLOURS;
            let points: Vec<_> = (series.values.iter().enumerate())
                .filter_map(|(index, value)| Some((index, (*value)?)))
                .map(|(index, value)| (self.centre(index), scale.y(value), index, value))
                .collect();
            let path: Vec<_> = points.iter().map(|(x, y, ..)| format!("{x:.1},{y:.1}")).collect();
            let _ = write!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"var(--c{colour})\" stroke-width=\"2\"{}/>",
                path.join(" "),
                dashes(series.dash)
            );
            for (x, y, index, value) in points {
                let title = self.title(series, index, value);
                let _ = write!(
                    svg,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"var(--c{colour})\">{title}</circle>"
                );
            }
        }
        self.figure(&svg, true)
    }

    /// Values as bars from zero, side by side in each category.
    pub(crate) fn bars(&self) -> String {
        let Some(scale) = self.scale(true) else { return String::new() };
        let mut svg = self.frame(&scale);
        let slot = 0.8 * self.pitch() / self.series.len() as f64;
        for (number, series) in self.series.iter().enumerate() {
            let colour = series.colour % COLOURS;
            for (index, value) in series.values.iter().enumerate() {
                let Some(value) = *value else { continue };
                let x = self.centre(index) - 0.4 * self.pitch() + number as f64 * slot;
                let (zero, y) = (scale.y(0.0), scale.y(value));
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"var(--c{colour})\">{}</rect>",
                    y.min(zero),
                    (slot - 1.5).max(1.0),
                    (zero - y).abs(),
                    self.title(series, index, value)
                );
            }
        }
        self.figure(&svg, false)
    }

    /// `None` without values.
    fn scale(&self, from_zero: bool) -> Option<Scale> {
        let values = self.series.iter().flat_map(|series| series.values.iter().flatten().copied());
        let finite: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let low = finite.iter().copied().reduce(f64::min)?;
        let high = finite.iter().copied().reduce(f64::max)?;
        let (low, high) = if from_zero { (low.min(0.0), high.max(0.0)) } else { (low, high) };
        Some(Scale::new(low, high))
    }

    /// Distance of two categories.
    fn pitch(&self) -> f64 {
        (WIDTH - LEFT - RIGHT) / self.categories.len().max(1) as f64
    }

    fn centre(&self, index: usize) -> f64 {
        LEFT + (index as f64 + 0.5) * self.pitch()
    }

    fn title(&self, series: &Series, index: usize, value: f64) -> String {
        let category = self.categories.get(index).map_or("", String::as_str);
        format!(
            "<title>{}</title>",
            escape(&format!("{}, {category}: {value:.2} {}", series.name, self.unit))
        )
    }

    /// Axes, grid and their labels.
    fn frame(&self, scale: &Scale) -> String {
        let mut svg = String::new();
        for tick in scale.ticks() {
            let y = scale.y(tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0,
                scale.label(tick)
            );
        }
        let base = HEIGHT - BOTTOM;
        let _ = write!(
            svg,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{base}\" y2=\"{base}\"/>",
            WIDTH - RIGHT
        );
        for (index, category) in self.categories.iter().enumerate() {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                self.centre(index),
                base + 17.0,
                escape(category)
            );
        }
        let _ = write!(
            svg,
            "<text class=\"soft\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text class=\"soft\" x=\"4\" y=\"10\">{}</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 8.0,
            escape(self.x_label),
            escape(self.unit)
        );
        svg
    }

    /// With caption and legend.
    fn figure(&self, svg: &str, lines: bool) -> String {
        let keys: String = (self.series.iter())
            .map(|series| {
                let colour = series.colour % COLOURS;
                let mark = if lines {
                    let dash = dashes(series.dash);
                    format!("<line x1=\"0\" x2=\"32\" y1=\"6\" y2=\"6\" stroke=\"var(--c{colour})\" stroke-width=\"3\"{dash}/>")
                } else {
                    format!("<rect width=\"32\" height=\"12\" fill=\"var(--c{colour})\"/>")
                };
                let name = escape(&series.name);
                format!("<span class=\"key\"><svg viewBox=\"0 0 32 12\" aria-hidden=\"true\">{mark}</svg>{name}</span>")
            })
            .collect();
        let caption = escape(self.caption);
        format!(
            "<figure><figcaption>{caption}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{caption}\">{svg}</svg><div>{keys}</div></figure>"
        )
    }
}

/// Dash pattern `index` of a line.
fn dashes(index: usize) -> &'static str {
    match index {
        0 => "",
        1 => " stroke-dasharray=\"7 4\"",
        _ => " stroke-dasharray=\"2 3\"",
    }
}

/// From values to heights.
#[derive(Debug)]
struct Scale {
    low: f64,
    high: f64,
    step: f64,
}

impl Scale {
    /// Round numbers around `low..=high`.
    fn new(low: f64, high: f64) -> Self {
        let span = if high > low { high - low } else { low.abs().max(1.0) };
        let rough = span / 5.0;
        let power = 10.0_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&step| step >= rough);
        let step = step.unwrap_or(10.0 * power);
        let (bottom, top) = ((low / step).floor() * step, (high / step).ceil() * step);
        Self { low: bottom, high: if top > bottom { top } else { bottom + step }, step }
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let count = ((self.high - self.low) / self.step).round() as usize;
        (0..=count).map(|i| self.low + i as f64 * self.step)
    }

    /// As many decimals as the step needs.
    fn label(&self, tick: f64) -> String {
        let decimals = (-self.step.log10().floor()).max(0.0) as usize;
        format!("{tick:.decimals$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_have_round_ticks_around_all_values() {
        for (low, high, ticks) in [
            (0.0, 1.0, vec!["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
            (12.3, 19.0, vec!["12", "14", "16", "18", "20"]),
            (-3.0, 40.0, vec!["-10", "0", "10", "20", "30", "40"]),
            (5.0, 5.0, vec!["5", "6"]),
        ] {
            let scale = Scale::new(low, high);
            let labels: Vec<_> = scale.ticks().map(|tick| scale.label(tick)).collect();
            assert_eq!(labels, ticks);
            assert!(scale.y(low) <= HEIGHT - BOTTOM && scale.y(high) >= TOP && scale.y(low) >= scale.y(high));
        }
    }

    #[test]
    fn absent_and_infinite_values_leave_the_rest() {
        let series =
            Series { name: "a & b".to_owned(), values: vec![Some(1.0), None, Some(3.0)], colour: 9, dash: 1 };
        let chart = Chart {
            caption: "c",
            x_label: "x",
            unit: "dB",
            categories: vec!["1".to_owned(), "2".to_owned(), "3".to_owned()],
            series: vec![series],
        };
        assert_eq!(chart.lines().matches("<circle").count(), 2);
        assert_eq!(chart.bars().matches("dB</title>").count(), 2);
        assert!(chart.bars().contains("a &amp; b, 3: 3.00 dB"));
        let empty = Chart { series: Vec::new(), ..chart };
        assert!(empty.bars().is_empty() && empty.lines().is_empty());
    }
}
