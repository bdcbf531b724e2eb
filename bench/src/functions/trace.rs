//! Which functions of running processes run. Every function gets a breakpoint that is taken away when it is hit, so that all calls
//! but the first cost nothing.

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options as Tracing};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

const BREAKPOINT: u8 = 0xcc;
/// How often breakpoints are set again that a daemon threw away with its text (`component_base::memory`).
const RENEWAL: Duration = Duration::from_secs(5);
const NAP: Duration = Duration::from_millis(1);

pub struct Function {
    pub name: String,
    /// Bytes.
    pub size: u64,
    pub ran: bool,
}

/// All functions of these processes, and whether they ran within this time.
pub fn watch(pids: &[i32], time: Duration) -> anyhow::Result<Vec<Function>> {
    let processes = pids.iter().map(|pid| Process::new(Pid::from_raw(*pid))).collect::<anyhow::Result<_>>()?;
    let mut tracer = Tracer { processes, threads: HashMap::new() };
    tracer.seize()?;
    let watched = tracer.watch(time);
    tracer.let_go()?;
    watched?;
    Ok(tracer.processes.into_iter().flat_map(|process| process.functions.into_values().map(|(f, _)| f)).collect())
}

struct Process {
    pid: Pid,
    memory: File,
    /// By address, with the byte that the breakpoint stands for.
    functions: HashMap<u64, (Function, u8)>,
}

struct Tracer {
    processes: Vec<Process>,
    /// Whose they are, by place in `processes`; those of a child as well, until it runs another program.
    threads: HashMap<Pid, usize>,
}

impl Process {
    fn new(pid: Pid) -> anyhow::Result<Self> {
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).with_context(|| format!("no process {pid}"))?;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let first = maps.lines().find(|line| line.ends_with(&*program.to_string_lossy()));
        let (base, _) = first.and_then(|line| line.split_once('-')).context("the program is not mapped")?;
        let base = u64::from_str_radix(base, 16)?;
        let memory = memory_of(pid)?;
        let mut functions = HashMap::new();
        let path = format!("/proc/{pid}/root{}", program.display());
        for (address, size, name) in symbols(&path)? {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, base + address)?;
            functions.insert(base + address, (Function { name, size, ran: false }, byte[0]));
        }
        ensure!(!functions.is_empty(), "{path} has no symbols");
        Ok(Self { pid, memory, functions })
    }

    /// Sets breakpoints, or takes them away, where nothing has run yet.
    fn set(&self, armed: bool) -> anyhow::Result<()> {
        for (address, (_, byte)) in self.functions.iter().filter(|(_, (function, _))| !function.ran) {
            self.memory.write_all_at(&[if armed { BREAKPOINT } else { *byte }], *address)?;
        }
        Ok(())
    }
}

impl Tracer {
    fn seize(&mut self) -> anyhow::Result<()> {
        let following = Tracing::PTRACE_O_TRACECLONE | Tracing::PTRACE_O_TRACEFORK | Tracing::PTRACE_O_TRACEVFORK;
        for (at, process) in self.processes.iter().enumerate() {
            for thread in std::fs::read_dir(format!("/proc/{}/task", process.pid))? {
                let thread = Pid::from_raw(thread?.file_name().to_string_lossy().parse()?);
                ptrace::seize(thread, following).with_context(|| format!("thread {thread}"))?;
                self.threads.insert(thread, at);
            }
        }
        Ok(())
    }

    fn watch(&mut self, time: Duration) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut renewal = begin;
        while begin.elapsed() < time {
            if Instant::now() >= renewal {
                self.processes.iter().try_for_each(|process| process.set(true))?;
                renewal = Instant::now() + RENEWAL;
            }
            while self.serve(None, WaitPidFlag::WNOHANG)? {}
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    /// Lets one thread go on that has stopped; whether there was one, and may be more.
    fn serve(&mut self, whose: Option<Pid>, how: WaitPidFlag) -> anyhow::Result<bool> {
        match waitpid(whose, Some(WaitPidFlag::__WALL | how)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(false),
            Ok(WaitStatus::Stopped(thread, Signal::SIGTRAP)) => self.hit(thread)?,
            Ok(WaitStatus::Stopped(thread, signal)) => go_on(thread, Some(signal))?,
            Ok(WaitStatus::PtraceEvent(thread, _, event)) => {
                // As it was asked to stop.
                if whose.is_some() && event == ptrace::Event::PTRACE_EVENT_STOP as i32 {
                    ptrace::detach(thread, None)?;
                    return Ok(false);
                }
                go_on(thread, None)?;
            }
            Ok(WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..)) => {
                ensure!(self.processes.iter().all(|process| process.pid != thread), "process {thread} has ended");
                self.threads.remove(&thread);
            }
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    fn hit(&mut self, thread: Pid) -> anyhow::Result<()> {
        let process = self.owner(thread)?;
        let mut registers = ptrace::getregs(thread)?;
        let address = registers.rip - 1;
        let Some((function, byte)) = self.processes[process].functions.get_mut(&address) else {
            return go_on(thread, Some(Signal::SIGTRAP));
        };
        function.ran = true;
        let byte = [*byte];
        self.processes[process].memory.write_all_at(&byte, address)?;
        // A child has the breakpoint in memory of its own.
        memory_of(thread)?.write_all_at(&byte, address)?;
        registers.rip = address;
        ptrace::setregs(thread, registers)?;
        go_on(thread, None)
    }

    /// The process that has this thread, which may be a new one, or a child's.
    fn owner(&mut self, thread: Pid) -> anyhow::Result<usize> {
        if let Some(known) = self.threads.get(&thread) {
            return Ok(*known);
        }
        let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
        let ids: Vec<i32> = ["Tgid:", "PPid:"]
            .iter()
            .filter_map(|name| status.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok())
            .collect();
        let owner = self.processes.iter().position(|process| ids.contains(&process.pid.as_raw()));
        let owner = owner.with_context(|| format!("thread {thread} is of no process that is watched"))?;
        self.threads.insert(thread, owner);
        Ok(owner)
    }

    /// Takes the breakpoints away, then leaves every thread.
    fn let_go(&mut self) -> anyhow::Result<()> {
        self.processes.iter().try_for_each(|process| process.set(false))?;
        for thread in self.threads.keys().copied().collect::<Vec<_>>() {
            if ptrace::interrupt(thread).is_ok() {
                while self.serve(Some(thread), WaitPidFlag::empty())? {}
            }
        }
        Ok(())
    }
}

fn memory_of(process: Pid) -> std::io::Result<File> {
    File::options().read(true).write(true).open(format!("/proc/{process}/mem"))
}

fn go_on(thread: Pid, signal: Option<Signal>) -> anyhow::Result<()> {
    match ptrace::cont(thread, signal) {
        // It has ended meanwhile.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The functions in a program's file: where they begin, their size and name.
fn symbols(program: &str) -> anyhow::Result<Vec<(u64, u64, String)>> {
    let output = Command::new("readelf").args(["--symbols", "--wide", "--demangle=rust", program]).output();
    let output = output.context("readelf (package binutils)")?;
    ensure!(output.status.success(), "readelf: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(symbol).collect())
}

/// A line of `readelf`: number, address, size, type, binding, visibility, section, name.
fn symbol(line: &str) -> Option<(u64, u64, String)> {
    let mut rest = line.trim_start();
    let mut fields = [""; 7];
    for field in &mut fields {
        let (first, behind) = rest.split_once(' ')?;
        (*field, rest) = (first, behind.trim_start());
    }
    let [_, address, size, kind, _, _, section] = fields;
    let (address, size) = (u64::from_str_radix(address, 16).ok()?, size.parse().ok()?);
    (kind == "FUNC" && section != "UND" && size > 0).then(|| (address, size, rest.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_told_from_other_symbols() {
        let line = "  5253: 00000000007b2350   509 FUNC    LOCAL  HIDDEN    16 <a::B<T> as c::D>::send";
        assert_eq!(symbol(line), Some((0x007b_2350, 509, "<a::B<T> as c::D>::send".to_owned())));
        for other in [
            "  1: 00000000007b2350   509 OBJECT  LOCAL  HIDDEN    16 TABLE",
            "  1: 0000000000000000     0 FUNC    GLOBAL DEFAULT   UND memcpy",
            "",
        ] {
            assert_eq!(symbol(other), None, "{other}");
        }
    }
}
