//! A wall clock that jumps, for processes of a test: a library laid over theirs that adds seconds to what the system says.
//! Their clock that only goes forward stays as it is, as it does on a machine whose time is set.

use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
static volatile const long long *seconds;
__attribute__((constructor)) static void look(void) {
    const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY) : -1;
    void *map = file < 0 ? MAP_FAILED : mmap(0, sizeof *seconds, PROT_READ, MAP_SHARED, file, 0);
    if (map != MAP_FAILED) seconds = map;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && seconds && clock == CLOCK_REALTIME) now->tv_sec += *seconds;
    return failed;
}
"#;

/// The clock of the processes that were started with its environment.
pub struct Clock {
    library: PathBuf,
    offset: PathBuf,
    _directory: tempfile::TempDir,
}

impl Clock {
    /// None where there is no C compiler.
    pub fn new() -> Option<Clock> {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let (source, library, offset) = (path("clock.c"), path("clock.so"), path("offset"));
        std::fs::write(&source, SOURCE).unwrap();
        std::fs::write(&offset, 0i64.to_ne_bytes()).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).args([&library, &source]).arg("-ldl").stdin(Stdio::null());
        if !compiler.status().is_ok_and(|status| status.success()) {
            println!("skipped: no C compiler");
            return None;
        }
        Some(Clock { library, offset, _directory: directory })
    }

    pub fn environment(&self) -> [(&'static str, &Path); 2] {
        [("LD_PRELOAD", &self.library), ("CLOCK_OFFSET", &self.offset)]
    }

    /// Sets the clock so many seconds off, in one step.
    pub fn jump(&self, seconds: i64) {
        // In place: the processes look at this very file.
        let mut file = std::fs::OpenOptions::new().write(true).open(&self.offset).unwrap();
        file.rewind().unwrap();
        file.write_all(&seconds.to_ne_bytes()).unwrap();
    }
}
