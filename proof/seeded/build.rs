//! Switches the bugs on.

fn main() {
    println!("cargo::rustc-cfg=seeded_bug");
    println!("cargo::rerun-if-changed=build.rs");
}
