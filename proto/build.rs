//! Generates the messages and stubs with a protobuf compiler written in Rust: no protoc is needed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=tributary");
    let files = ["tributary/coordinator/v1/coordinator.proto", "tributary/admin/v1/admin.proto"];
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().bytes(".tributary.coordinator.v1.Chunk.data").compile_fds(descriptors)?;
    Ok(())
}
