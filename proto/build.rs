//! Turns the definitions in `protos/` into Rust at build time (needs `protoc`).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_protos(&["protos/cri.proto", "protos/health.proto"], &["protos"])?;
    Ok(())
}
