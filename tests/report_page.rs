//! The page of `peerbus bench tradeoff` in a real browser: `.ci/with-browser cargo test --test
//! report_page`.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(all(target_os = "linux", feature = "cli"))]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::private_dir;

/// A script that reports the page's layout to the frame around it.
const LOOK: &str = r#"<script>
addEventListener('load', () => {
    const page = document.documentElement, told = {};
    const wide = (it) => it.scrollWidth > it.clientWidth + 1
        && getComputedStyle(it).overflowX === 'visible' && !(it instanceof SVGElement);
    told.width = [page.scrollWidth, page.clientWidth];
    told.spilling = [...document.querySelectorAll('main *')].filter(wide).map((it) => it.className);
    const size = (it) => { const box = it.getBoundingClientRect(); return [box.width, box.height]; };
    told.charts = [...document.querySelectorAll('svg.chart')].map(size);
    told.text = [...document.querySelectorAll('svg.chart text')].map((it) => size(it)[1]);
    told.loads = performance.getEntriesByType('resource').map((it) => it.name);
    parent.postMessage('TOLD' + JSON.stringify(told) + 'END', '*');
});
</script>"#;

/// The path of the browser, if there is one.
fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("PEERBUS_BROWSER").map(PathBuf::from);
    if named.is_none() {
        println!("SKIPPED: PEERBUS_BROWSER is not set (.ci/with-browser cargo test …)");
    }
    named
}

fn chromium(browser: &Path, profile: &Path, args: &[&str]) -> Vec<u8> {
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A page of a short run, with a fault in it.
fn page(dir: &Path) -> String {
    let (file, page) = (dir.join("w.toml"), dir.join("page.html"));
    std::fs::write(
        &file,
        r#"
        [[workload]]
        name = "asked"
        pattern = "request"
        seconds = 0.2
        [[workload]]
        name = "killed"
        guaranteed = "both"
        rate = 500
        seconds = 0.6
        fault = { kill = "receiver", after = 0.2, for = 0.1 }
        "#,
    )
    .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_peerbus"))
        .args(["bench", "tradeoff", file.to_str().unwrap(), "--rounds=1"])
        .args(["--system=mesh", "--system=outbox", "--system=embedded"])
        .args(["--dir", dir.to_str().unwrap(), "--html", page.to_str().unwrap()])
        .env("XDG_RUNTIME_DIR", dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read_to_string(page).unwrap()
}

#[test]
fn the_page_fits_a_phone_and_a_desk_and_prints() {
    let Some(browser) = browser() else { return };
    let dir = private_dir();
    let (page, profile) = (page(dir.path()), dir.path().join("profile"));
    assert!(!page.contains("<script") && !page.contains("http://") && !page.contains("https://"));
    let looked_at = dir.path().join("looked-at.html");
    std::fs::write(&looked_at, page.replace("</body>", &format!("{LOOK}</body>"))).unwrap();
    let url = format!("file://{}", looked_at.display());
    // The browser's minimum window width is 500 px: a frame stands in for a phone.
    for width in [360, 1280] {
        let frame = dir.path().join("frame.html");
        let framed = format!(
            "<iframe src=\"{url}\" style=\"width:{width}px;height:900px;border:0\"></iframe>\
             <script>addEventListener('message', (e) => document.body.textContent = e.data)</script>"
        );
        std::fs::write(&frame, framed).unwrap();
        let frame = format!("file://{}", frame.display());
        let args = ["--dump-dom", "--virtual-time-budget=10000", "--window-size=1400,1000", &frame];
        let dom = String::from_utf8(chromium(&browser, &profile, &args)).unwrap();
        let told = dom.split_once("TOLD").and_then(|(_, rest)| rest.split_once("END"));
        let told = told.unwrap_or_else(|| panic!("the page said nothing: {dom}")).0;
        let told: serde_json::Value = serde_json::from_str(told).unwrap();
        assert!(told["width"][0].as_f64() <= told["width"][1].as_f64(), "{width} px: {told}");
        assert_eq!(told["spilling"], serde_json::json!([]), "{width} px");
        assert_eq!(told["loads"], serde_json::json!([]), "it needs nothing but itself");
        let charts = told["charts"].as_array().unwrap();
        assert!(charts.len() >= 4, "{told}");
        for chart in charts {
            let (wide, high) = (chart[0].as_f64().unwrap(), chart[1].as_f64().unwrap());
            assert!(wide > 200.0 && wide <= f64::from(width) && high > 20.0, "{width} px: {chart}");
        }
        let texts = told["text"].as_array().unwrap();
        assert!(texts.iter().all(|high| high.as_f64().unwrap() >= 8.0), "{width} px: {texts:?}");
    }
    let pdf = dir.path().join("page.pdf");
    chromium(&browser, &profile, &[&format!("--print-to-pdf={}", pdf.display()), &url]);
    assert!(std::fs::read(pdf).unwrap().starts_with(b"%PDF"));
}
