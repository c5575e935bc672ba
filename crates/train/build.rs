//! Compiles the worker's C++ shim. Does nothing for the light half, which links no libtorch.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "worker")]
    worker();
}

#[cfg(feature = "worker")]
fn worker() {
    use std::path::PathBuf;

    const SOURCES: [&str; 4] = [
        "src/worker/shim.cpp",
        "src/worker/fused.cpp",
        "src/worker/blockwise.cpp",
        "src/worker/update.cpp",
    ];
    for path in SOURCES.iter().chain(&["src/worker/shim.h", "src/worker/blockwise.h"]) {
        println!("cargo:rerun-if-changed={path}");
    }

    // torch-sys (`links = "tch"`) tells its direct dependents which libtorch it found.
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let lib = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names it"));
    let lib = lib.canonicalize().unwrap_or(lib);
    let include = lib.parent().expect("libtorch/lib has a parent").join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        // The headers are not ours to mend.
        .flag(format!("-isystem{}", include.display()))
        .flag(format!("-isystem{}", include.join("torch/csrc/api/include").display()))
        // The same bits, whatever instructions a processor has.
        .flag("-ffp-contract=off")
        .files(SOURCES)
        .compile("anneal_train_shim");

    let lib = lib.display();
    println!("cargo:rustc-link-search=native={lib}");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    // A RUNPATH, so that the worker starts without LD_LIBRARY_PATH, which still comes first.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib},--enable-new-dtags");
}
