//! Curves as SVG that inherits the page's colours, so that one picture serves light and dark pages.

use std::error::Error;

use plotters::prelude::*;
use plotters::style::TRANSPARENT;

/// Stands for the page's own text colour until the picture is finished.
const INK: RGBColor = RGBColor(0x7f, 0x7f, 0x7e);
const INK_TEXT: &str = "#7F7F7E";
/// Most points of one curve: more cannot be told apart.
const POINTS: usize = 1000;
const SIZE: (u32, u32) = (720, 300);

/// Colours that people with any colour vision can tell apart, readable on black and white (after Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xb8, 0x8a, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x80, 0x80, 0x80),
];

/// The colour of curve number `index`, for a legend, as `#rrggbb`.
pub(crate) fn colour(index: usize) -> String {
    let RGBColor(red, green, blue) = pick(index);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// The first curves have the colours that are told apart best, later ones hues that do not repeat.
fn pick(index: usize) -> RGBColor {
    COLOURS.get(index).copied().unwrap_or_else(|| {
        // Steps of the golden ratio spread any number of hues evenly.
        let hue = (index as f64 * 0.618_033_988_75).fract();
        let (red, green, blue) = HSLColor(hue, 0.7, 0.42).rgb();
        RGBColor(red, green, blue)
    })
}

/// What the vertical axis shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    /// A share from 0 to 1.
    Share(&'static str),
    /// Values from 0 up to the largest.
    FromZero(&'static str),
}

/// What the horizontal axis shows.
struct Horizontal<'a> {
    label: &'a str,
    from: f64,
    to: f64,
    /// Positions are decimal logarithms of what their labels say.
    logarithmic: bool,
}

impl Horizontal<'_> {
    /// The label at position `x`.
    fn text(&self, x: f64) -> String {
        let value = if self.logarithmic { 10f64.powf(x) } else { x };
        // Three significant digits, without the zeros that say nothing.
        let digits = (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 9.0) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    }
}

/// One curve: (round, value) in increasing rounds.
pub(crate) type Curve = Vec<(f64, f64)>;

/// Draws curves over the rounds as one `<svg>` element; `None` where there is nothing to draw.
pub(crate) fn curves(axis: Axis, curves: &[Curve]) -> Option<String> {
    let finite = |curve: &Curve| -> Curve {
        let points: Vec<_> = curve.iter().copied().filter(|(_, value)| value.is_finite()).collect();
        let every = points.len().div_ceil(POINTS).max(1);
        let last = points.len().saturating_sub(1);
        points
            .into_iter()
            .enumerate()
            .filter(|(at, _)| at % every == 0 || *at == last)
            .map(|(_, point)| point)
            .collect()
    };
    let curves: Vec<Curve> = curves.iter().map(finite).collect();
    if curves.iter().all(Vec::is_empty) {
        return None;
    }
    let last = curves.iter().flatten().map(|(round, _)| *round).fold(1.0, f64::max);
    // Drawing into a string does not fail; a picture less would be the lesser evil if it did.
    draw(axis, &Horizontal { label: "round", from: 0.0, to: last, logarithmic: false }, &curves).ok()
}

/// Draws values against a setting called `key`, on a logarithmic axis where its values differ by a factor of ten or
/// more; `None` where there are not two values of the setting.
pub(crate) fn against(axis: Axis, key: &str, curve: &Curve) -> Option<String> {
    let mut points: Curve = curve.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let ends = |points: &Curve| Some((points.first()?.0, points.last()?.0));
    let (least, most) = ends(&points)?;
    let logarithmic = least > 0.0 && most / least >= 10.0;
    if logarithmic {
        points.iter_mut().for_each(|(x, _)| *x = x.log10());
    }
    let (from, to) = ends(&points).filter(|(from, to)| from < to)?;
    let room = (to - from) * 0.03;
    let horizontal = Horizontal { label: key, from: from - room, to: to + room, logarithmic };
    draw(axis, &horizontal, &[points]).ok()
}

fn draw(axis: Axis, horizontal: &Horizontal<'_>, curves: &[Curve]) -> Result<String, Box<dyn Error>> {
    let points = || curves.iter().flatten();
    let (label, top) = match axis {
        Axis::Share(label) => (label, 1.0),
        Axis::FromZero(label) => (label, points().map(|(_, value)| *value).fold(0.0, f64::max) * 1.05),
    };
    let top = if top > 0.0 { top } else { 1.0 };
    let whole = horizontal.label == "round";
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(38)
            .y_label_area_size(58)
            .build_cartesian_2d(horizontal.from..horizontal.to, 0.0..top)?;
        let text = ("sans-serif", 13).into_font().color(&INK);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.25))
            .axis_style(INK)
            .label_style(text.clone())
            .axis_desc_style(text)
            .x_desc(horizontal.label)
            .x_label_formatter(&|x| horizontal.text(*x))
            .x_labels(if whole { horizontal.to.min(10.0) as usize + 1 } else { 8 })
            .y_desc(label)
            .draw()?;
        for (index, curve) in curves.iter().enumerate() {
            let style = ShapeStyle { color: pick(index).into(), filled: true, stroke_width: 2 };
            chart.draw_series(LineSeries::new(curve.iter().copied(), style))?;
            if curve.len() < 40 {
                chart.draw_series(curve.iter().map(|point| Circle::new(*point, 2, style)))?;
            }
        }
        area.present()?;
    }
    let by: String = horizontal.label.chars().filter(|c| !"<>&\"".contains(*c)).collect();
    let named = format!("<svg role=\"img\" aria-label=\"{label} by {by}\" ");
    Ok(svg.replace(INK_TEXT, "currentColor").replacen("<svg ", &named, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_its_curves_and_takes_the_pages_colour() {
        let one: Curve = (1..=50).map(|round| (f64::from(round), 1.0 / f64::from(round))).collect();
        let svg = curves(Axis::Share("accuracy"), &[one.clone(), vec![(1.0, 0.5)]]).unwrap();
        assert!(svg.starts_with("<svg role=\"img\"") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("currentColor") && !svg.contains(INK_TEXT));
        assert!(svg.contains(&colour(0).to_uppercase()) && svg.contains(&colour(1).to_uppercase()));
        assert!(svg.contains("accuracy") && svg.contains("round"));
        let infinite: Curve = vec![(1.0, f64::NAN), (2.0, f64::INFINITY)];
        assert_eq!(curves(Axis::FromZero("loss"), &[infinite]), None);
        let zero = curves(Axis::FromZero("loss"), &[vec![(1.0, 0.0), (2.0, 0.0)]]).unwrap();
        assert!(!zero.contains("NaN"));
        let long: Curve = (0..100_000).map(|round| (f64::from(round), 0.5)).collect();
        assert!(curves(Axis::Share("accuracy"), &[long]).unwrap().len() < 100_000);
    }
}
