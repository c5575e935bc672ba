//! Compiles `src/chat.cpp` and llama.cpp's Jinja, from the sources that llama-cpp-sys-2 has just built.
//!
//! The rest of llama.cpp's `common` (its feature of that crate) is a third of the time and not used.

fn main() {
    println!("cargo:rerun-if-changed=src/chat.cpp");
    #[cfg(feature = "engine")]
    engine();
}

#[cfg(feature = "engine")]
fn engine() {
    // The crate tells where it built, and its cache where the sources lie.
    let root = std::env::var("DEP_LLAMA_ROOT").expect("llama-cpp-sys-2 tells its root");
    let cache = std::path::Path::new(&root).join("build/CMakeCache.txt");
    let text = std::fs::read_to_string(&cache)
        .unwrap_or_else(|e| panic!("cannot read {}: {e}", cache.display()));
    let source = text
        .lines()
        .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .unwrap_or_else(|| panic!("{} names no sources", cache.display()));
    let source = std::path::Path::new(source);
    let common = source.join("common");
    let jinja = ["lexer", "parser", "runtime", "string", "value"];
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("src/chat.cpp")
        .files(jinja.map(|name| common.join("jinja").join(name).with_extension("cpp")))
        .files(["json.cpp", "unicode.cpp"].map(|name| common.join(name)))
        .includes(["ggml/include", "common", "vendor"].map(|part| source.join(part)))
        .warnings(false)
        .compile("anneal_chat");
}
