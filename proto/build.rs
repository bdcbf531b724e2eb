//! Turns the definitions in `protos/` into Rust at build time (needs `protoc`).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let names = ["cri", "csi", "deviceplugin", "dra", "dra_health", "health", "pluginregistration", "podresources"];
    let files: Vec<String> = names.iter().map(|name| format!("protos/{name}.proto")).collect();
    tonic_prost_build::configure().btree_map(".").compile_protos(&files, &["protos".to_owned()])?;
    Ok(())
}
