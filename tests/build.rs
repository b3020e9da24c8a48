//! Where a built binary, test or doctest finds libtorch: `../lib` beside it (the layout of `cargo xtask dist`),
//! and, outside `dist`, the folder that it was linked against.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=TRIBUTARY_DIST");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib");
    if let (Ok(folder), Err(_)) = (std::env::var("LIBTORCH"), std::env::var("TRIBUTARY_DIST")) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}/lib");
    }
}
