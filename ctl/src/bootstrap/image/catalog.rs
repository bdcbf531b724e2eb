//! The images that a machine without a registry needs, each made from what is on the machine: the pod sandbox's `pause`,
//! cluster DNS, `busybox` from Debian's busybox-static, and two versions of the demo web server.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::oci::Image;
use crate::bootstrap::config::{DNS_IMAGE, PAUSE_IMAGE};

/// Debian's and Ubuntu's static busybox.
const BUSYBOX: &str = "/bin/busybox";

/// The images by their short names.
pub(crate) const NAMES: [&str; 5] = ["pause", "dns", "busybox", "httpd-app-1.0", "httpd-app-2.0"];

/// Makes the image of that short name; `binaries` is where our own programs are.
pub(crate) fn image(name: &str, binaries: &Path) -> Result<Image> {
    match name {
        "pause" => pause(&binaries.join("pause")),
        "dns" => dns(&binaries.join("dns")),
        "busybox" => busybox(Path::new(BUSYBOX)),
        "httpd-app-1.0" => httpd_app(&binaries.join("httpd"), "1.0"),
        "httpd-app-2.0" => httpd_app(&binaries.join("httpd"), "2.0"),
        _ => bail!("no image is named {name:?}; there are {}", NAMES.join(", ")),
    }
}

fn pause(binary: &Path) -> Result<Image> {
    let mut image = Image {
        names: vec![PAUSE_IMAGE.into()],
        entrypoint: vec!["/pause".into()],
        user: "65535:65535".into(),
        ..Image::default()
    };
    image.add_file("pause", 0o755, read_static(binary)?);
    Ok(image)
}

fn dns(binary: &Path) -> Result<Image> {
    let mut image = Image {
        names: vec![DNS_IMAGE.into()],
        entrypoint: vec!["/dns".into()],
        ports: vec!["53/tcp".into(), "53/udp".into()],
        ..Image::default()
    };
    // With what it is linked to: only programs of a few dependencies are built statically.
    image.add_file("dns", 0o755, read_program(binary)?);
    for library in libraries(binary)? {
        let contents = std::fs::read(&library).with_context(|| format!("cannot read {library}"))?;
        image.add_file(library.trim_start_matches('/'), 0o755, contents);
    }
    Ok(image)
}

fn httpd_app(binary: &Path, version: &str) -> Result<Image> {
    let mut image = Image {
        names: vec![format!("docker.io/library/httpd-app:{version}")],
        entrypoint: vec!["/httpd".into()],
        environment: vec![format!("VERSION={version}")],
        ports: vec!["80/tcp".into()],
        ..Image::default()
    };
    image.add_file("httpd", 0o755, read_static(binary)?);
    image.add_directory("tmp", 0o1777);
    Ok(image)
}

fn busybox(binary: &Path) -> Result<Image> {
    let contents = read_static(binary)?;
    let listing = Command::new(binary)
        .arg("--list-full")
        .output()
        .with_context(|| format!("cannot run {} --list-full", binary.display()))?;
    Ok(busybox_image(contents, &String::from_utf8_lossy(&listing.stdout)))
}

/// `applets` is what `busybox --list-full` prints: a path a line.
fn busybox_image(binary: Vec<u8>, applets: &str) -> Image {
    let mut image = Image {
        names: vec!["docker.io/library/busybox:latest".into(), "docker.io/library/busybox:stable".into()],
        command: vec!["sh".into()],
        ..Image::default()
    };
    image.add_file("bin/busybox", 0o755, binary);
    for applet in applets.lines().filter(|applet| !applet.is_empty() && *applet != "bin/busybox") {
        image.add_symlink(applet, "/bin/busybox");
    }
    image.add_file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n".to_vec(),
    );
    image.add_file("etc/group", 0o644, b"root:x:0:\nnobody:x:65534:\n".to_vec());
    image.add_directory("root", 0o700);
    image.add_directory("tmp", 0o1777);
    for directory in ["home", "var/spool", "var/www", "usr/sbin", "dev", "proc", "sys"] {
        image.add_directory(directory, 0o755);
    }
    image
}

fn read_program(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !bytes.starts_with(b"\x7fELF") {
        bail!("{} is not a program", path.display());
    }
    Ok(bytes)
}

/// The loader and the shared libraries of a program, as this machine has them; none of a static one.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let said = Command::new("ldd").arg(program).output().context("cannot run ldd, which comes with libc")?;
    let listed = String::from_utf8_lossy(&said.stdout);
    if listed.contains("not found") {
        bail!("{} needs libraries that are not on this machine:\n{listed}", program.display());
    }
    Ok(paths_of(&listed))
}

/// The files in what `ldd` prints: `libc.so.6 => /lib/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn paths_of(listed: &str) -> Vec<String> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
    listed.lines().filter_map(path).collect()
}

/// Reads a program that runs without any library beside it.
fn read_static(path: &Path) -> Result<Vec<u8>> {
    let bytes = read_program(path)?;
    if needs_interpreter(&bytes) {
        bail!("{} needs shared libraries, so it cannot stand alone in an image; build it statically", path.display());
    }
    Ok(bytes)
}

/// Whether a 64-bit little-endian ELF file has a PT_INTERP program header.
fn needs_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, len: usize| {
        elf.get(at..at + len).map(|bytes| bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    let (Some(table), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2)) else { return false };
    let (table, size) = (usize::try_from(table).unwrap_or(usize::MAX), size as usize);
    (0..count as usize).any(|index| {
        index
            .checked_mul(size)
            .and_then(|offset| table.checked_add(offset))
            .and_then(|at| at.checked_add(4).map(|_| at))
            .and_then(|at| number(at, 4))
            == Some(PT_INTERP)
    })
}

/// Where our programs are: beside `ctl` itself, where it is installed and where it is built.
pub(crate) fn default_binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    own.parent().map(Path::to_owned).context("this program is in no directory")
}

#[cfg(test)]
mod tests {
    use super::super::oci::Entry;
    use super::*;

    #[test]
    fn busybox_links_its_applets_but_not_itself() {
        let image = busybox_image(b"x".to_vec(), "bin/busybox\nbin/sh\nusr/bin/[\nsbin/ip\n");
        assert!(matches!(&image.entries["bin/busybox"], Entry::File { mode: 0o755, .. }));
        for applet in ["bin/sh", "usr/bin/[", "sbin/ip"] {
            assert!(
                matches!(&image.entries[applet], Entry::Symlink { target } if target == "/bin/busybox"),
                "{applet}"
            );
        }
        assert!(matches!(&image.entries["tmp"], Entry::Directory { mode: 0o1777 }));
    }

    #[test]
    fn an_image_holds_what_its_program_is_linked_to() -> Result<()> {
        let listed = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(paths_of(listed), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(paths_of("\tnot a dynamic executable\n").is_empty());
        let image = dns(&std::env::current_exe()?)?;
        assert!(image.entries.keys().any(|path| path.contains("/libc.so")), "{:?}", image.entries.keys());
        Ok(())
    }

    #[test]
    fn a_program_with_shared_libraries_is_refused() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let error = read_static(&std::env::current_exe()?).unwrap_err();
        assert!(error.to_string().contains("needs shared libraries"), "{error}");
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh\n")?;
        assert!(read_static(&script).unwrap_err().to_string().contains("is not a program"));
        // A header that ends early must not be read past.
        assert!(!needs_interpreter(b"\x7fELF"));
        assert!(!needs_interpreter(&[0xff; 64]));
        Ok(())
    }
}
