//! Charts for the documents, without a library: bars beside each other, one group for each name.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const COLOURS: [&str; 3] = ["#2563eb", "#f59e0b", "#10b981"];

/// `groups` are names with one value for each of `series`; written to `path`.
pub fn bars(path: &str, title: &str, series: &[&str], groups: &[(String, Vec<f64>)]) {
    let most = groups
        .iter()
        .flat_map(|(_, values)| values)
        .fold(1.0, |most: f64, value| most.max(*value));
    let (bar, gap, left) = (18.0, 14.0, 190.0);
    let group = bar * series.len() as f64 + gap;
    let height = 70.0 + group * groups.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"16\" y=\"24\" \
         font-size=\"15\">{title}</text>\n"
    );
    for (index, name) in series.iter().enumerate() {
        let x = left + 150.0 * index as f64;
        let colour = COLOURS[index % COLOURS.len()];
        writeln!(
            svg,
            "<rect x=\"{x}\" y=\"36\" width=\"12\" height=\"12\" fill=\"{colour}\"/>"
        )
        .unwrap();
        writeln!(svg, "<text x=\"{}\" y=\"47\">{name}</text>", x + 18.0).unwrap();
    }
    for (index, (name, values)) in groups.iter().enumerate() {
        let top = 62.0 + group * index as f64;
        let middle = top + bar * series.len() as f64 / 2.0 + 5.0;
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{name}</text>",
            left - 10.0
        )
        .unwrap();
        for (index, value) in values.iter().enumerate() {
            let y = top + bar * index as f64;
            let width = value / most * (WIDTH - left - 70.0);
            let colour = COLOURS[index % COLOURS.len()];
            writeln!(
                svg,
                "<rect x=\"{left}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>\n<text x=\"{:.1}\" \
                 y=\"{:.1}\">{value:.2}</text>",
                bar - 3.0,
                left + width + 6.0,
                y + 12.0
            )
            .unwrap();
        }
    }
    svg += "</svg>\n";
    std::fs::write(path, svg).unwrap();
}
