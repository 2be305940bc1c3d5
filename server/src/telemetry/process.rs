//! What this process uses of the machine, from Linux' /proc; zeros elsewhere.

use std::fs;

/// Linux counts processor time in hundredths of a second: `USER_HZ` is 100 on every architecture Rust runs on.
const TICKS_PER_SEC: f64 = 100.0;

/// The process and the machine's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct ProcessUsage {
    /// Resident memory.
    pub(crate) resident_bytes: usize,
    /// Memory of the machine.
    pub(crate) machine_bytes: usize,
    /// Processor time, user and system.
    pub(crate) cpu_secs: f64,
}

/// Reads it now.
pub(crate) fn usage() -> ProcessUsage {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    ProcessUsage {
        resident_bytes: kilobytes(&read("/proc/self/status"), "VmRSS:") * 1024,
        machine_bytes: kilobytes(&read("/proc/meminfo"), "MemTotal:") * 1024,
        cpu_secs: ticks(&read("/proc/self/stat")) / TICKS_PER_SEC,
    }
}

/// The figure of the line `key  123 kB`.
fn kilobytes(text: &str, key: &str) -> usize {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// utime + stime, fields 14 and 15 of `/proc/self/stat`. Field 2, the name, may have spaces but ends at the last `)`.
fn ticks(stat: &str) -> f64 {
    let Some((_, fields)) = stat.rsplit_once(')') else { return 0.0 };
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_linux() {
        assert_eq!(kilobytes("Name:\tx\nVmRSS:\t   1234 kB\n", "VmRSS:"), 1234);
        assert_eq!(kilobytes("", "VmRSS:"), 0);
        assert_eq!(ticks("7 (a ) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0"), 300.0);
        assert_eq!(ticks(""), 0.0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process() {
        let usage = usage();
        assert!(usage.resident_bytes > 1 << 20 && usage.machine_bytes > usage.resident_bytes, "{usage:?}");
    }
}
