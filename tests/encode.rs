//! `shadowserve encode` and `decode` as a user runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/perf/samples/smollm2-135m-kv-640.safetensors");

fn shadowserve(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shadowserve")).args(arguments).output().expect("the program starts")
}

fn json(arguments: &[&str]) -> serde_json::Value {
    let output = shadowserve(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn error(arguments: &[&str]) -> String {
    let output = shadowserve(arguments);
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

#[test]
fn what_is_lossless_comes_back_as_it_was() {
    let folder = Folder::new();
    let (encoded, decoded) = (folder.path("kv.chunks"), folder.path("kv.safetensors"));
    let report = json(&[
        "encode",
        "--input",
        SAMPLE,
        "--out",
        &encoded,
        "--codec",
        "lossless",
        "--zstd-level",
        "-5",
        "--json",
    ]);
    assert_eq!((report["chunks"].as_u64(), report["codec"].as_str()), (Some(3), Some("lossless")));
    json(&["decode", "--input", &encoded, "--out", &decoded, "--tokens-from", SAMPLE, "--json"]);
    for name in ["k", "v", "tokens"] {
        assert_eq!(tensor(Path::new(&decoded), name), tensor(Path::new(SAMPLE), name), "{name}");
    }
}

#[test]
fn profiles_reach_their_target() {
    let folder = Folder::new();
    let (profile, encoded) = (folder.path("profile.toml"), folder.path("kv.chunks"));
    for target in [3.0, 4.5] {
        let text = target.to_string();
        let made =
            ["encode", "--input", SAMPLE, "--make-profile", &profile, "--target-ratio", &text, "--json"];
        let made = json(&made)["ratio"].as_f64().unwrap();
        assert!(made >= target && made < target * 1.1, "{made} for {target}");
        let used = json(&["encode", "--input", SAMPLE, "--profile", &profile, "--out", &encoded, "--json"]);
        assert_eq!(used["ratio"].as_f64(), Some(made));
        assert!(used["codec"].as_str().unwrap().starts_with("profile-"));
    }
    let by_error =
        ["encode", "--input", SAMPLE, "--make-profile", &profile, "--target-error", "0.001", "--json"];
    let by_error = json(&by_error)["ratio"].as_f64().unwrap();
    assert!(by_error > 2.0 && by_error < 3.0, "{by_error}");
    let text = std::fs::read_to_string(&profile).unwrap();
    assert!(text.starts_with("# Made by") && text.contains("[k]") && text.contains("[v]"), "{text}");
}

#[test]
fn faults_say_what_to_do() {
    let folder = Folder::new();
    let (profile, encoded) = (folder.path("profile.toml"), folder.path("kv.chunks"));
    let out = folder.path("out");
    let fault = error(&["encode", "--input", SAMPLE, "--make-profile", &profile]);
    assert!(fault.contains("--target-ratio or --target-error"), "{fault}");

    std::fs::write(&profile, "layers = 4\nkv_heads = 3\nhead_dim = 64\n[k]\n\"0-3\" = \"int9\"\n[v]\n")
        .unwrap();
    let fault = error(&["encode", "--input", SAMPLE, "--profile", &profile, "--out", &out]);
    assert!(fault.contains("profile.toml") && fault.contains("line 5") && fault.contains("int9"), "{fault}");

    let every = "[k]\n\"0-1\" = \"int4\"\n[v]\n\"0-1\" = \"int4\"\n";
    std::fs::write(&profile, format!("layers = 2\nkv_heads = 3\nhead_dim = 64\n{every}")).unwrap();
    let fault = error(&["encode", "--input", SAMPLE, "--profile", &profile, "--out", &out]);
    assert!(fault.contains("2 layers") && fault.contains("4 layers"), "{fault}");

    json(&["encode", "--input", SAMPLE, "--out", &encoded, "--json"]);
    let bytes = std::fs::read(&encoded).unwrap();
    std::fs::write(&encoded, &bytes[..bytes.len() - 1]).unwrap();
    let fault = error(&["decode", "--input", &encoded, "--out", &out]);
    assert!(fault.contains("chunk 2 at byte"), "{fault}");
    let mut flipped = bytes.clone();
    flipped[5000] ^= 1;
    std::fs::write(&encoded, &flipped).unwrap();
    let fault = error(&["decode", "--input", &encoded, "--out", &out]);
    assert!(fault.contains("chunk 0") && fault.contains("layer"), "{fault}");
    assert!(!PathBuf::from(&out).exists());
}

/// The bytes of one tensor.
fn tensor(path: &Path, name: &str) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let header_bytes = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let at = |end: usize| usize::try_from(header[name]["data_offsets"][end].as_u64().unwrap()).unwrap();
    bytes[8 + header_bytes..][at(0)..at(1)].to_vec()
}
