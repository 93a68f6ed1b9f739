//! Promise: the crates depend on each other only as ARCHITECTURE.md says.
//! The provider and the router never see each other; the engine sees only the shared words.

use std::{collections::BTreeSet, fs, path::Path};

/// The workspace crates that `krate` names as ordinary dependencies.
fn workspace_dependencies(krate: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(krate).join("Cargo.toml");
    let manifest = fs::read_to_string(&path).expect("each crate has a manifest");
    let section = manifest.split("\n[dependencies]").nth(1).unwrap_or("");
    let section = section.split("\n[").next().unwrap_or("");
    ["cm", "engine", "provider", "router", "verbs-abi", "xtask"]
        .into_iter()
        .filter(|name| {
            section.lines().any(|line| {
                line.trim_start().starts_with(&format!("{name}."))
                    || line.trim_start().starts_with(&format!("{name} "))
            })
        })
        .map(str::to_owned)
        .collect()
}

fn names(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn crates_never_call_up() {
    assert_eq!(workspace_dependencies("verbs-abi"), names(&[]));
    assert_eq!(workspace_dependencies("engine"), names(&["verbs-abi"]));
    assert_eq!(workspace_dependencies("cm"), names(&["verbs-abi"]));
    assert_eq!(workspace_dependencies("provider"), names(&["engine", "verbs-abi"]));
    assert_eq!(workspace_dependencies("router"), names(&["cm", "engine", "verbs-abi"]));
    assert_eq!(workspace_dependencies("fuzz"), names(&["engine", "router", "verbs-abi"]));
    assert_eq!(workspace_dependencies("xtask"), names(&[]));
}
