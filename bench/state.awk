# Prints the table of scripts/bench state from its "result VMM ROW NUMBER" lines.

$1 == "result" { value[$2, $3] = $4 }

function row(text, number, unit, target, met) {
    printf "%-62s %12s %-4s %-28s %s\n", text, number, unit, target, number == "" || target == "" ? "" : met ? "met" : "missed"
}
function ms(ns) { return ns == "" ? "" : sprintf("%.2f", ns / 1e6) }
function ratio(a, b) { return a == "" || b == "" || b + 0 == 0 ? "" : sprintf("%.3f", a / b) }

END {
    small = value["rvmm", "restore_512M_entry_ns"]
    large = value["rvmm", "restore_2G_entry_ns"]
    qemu = value["qemu", "restore_512M_entry_ns"]
    row("restore of 512 MiB: exec to the first instruction", ms(small), "ms", "<= 10 ms", small <= 1e7)
    row("the same of 2 GiB", ms(large), "ms", "", 0)
    row("the same by QEMU (-incoming file:)", qemu ~ /^[0-9]/ ? ms(qemu) : qemu, "ms", "", 0)
    share = qemu ~ /^[0-9]/ ? ratio(small, qemu) : ""
    row("rvmm / QEMU", share, "x", "<= 0.1 x", share <= 0.1)
    share = ratio(value["rvmm", "restore_answer_ns"], value["rvmm", "boot_ns"])
    row("boot to power off", ms(value["rvmm", "boot_ns"]), "ms", "", 0)
    row("restore to an answer of the shell and power off", ms(value["rvmm", "restore_answer_ns"]), "ms", "", 0)
    row("restore / boot", share, "x", "<= 0.05 x", share <= 0.05)
    row("memory in use that is saved", sprintf("%.1f", value["rvmm", "saved_bytes"] / 1048576), "MiB", "", 0)
    row("save", ms(value["rvmm", "save_ns"]), "ms", "", 0)
    row("dd of as many bytes", ms(value["dd", "save_ns"]), "ms", "", 0)
    share = ratio(value["rvmm", "save_ns"], value["dd", "save_ns"])
    row("save / dd", share, "x", "<= 1.3 x", share <= 1.3)
    row("save --live", ms(value["rvmm", "save_live_ns"]), "ms", "", 0)
    row("save --live: the guest stands still", ms(value["rvmm", "save_live_paused_ns"]), "ms", "", 0)
    row("memory of each of 49 more idle clones", value["rvmm", "clone_kb"], "KiB", "<= 4096 KiB", value["rvmm", "clone_kb"] <= 4096)
    row("clones that run", value["rvmm", "clones"], "", "50", value["rvmm", "clones"] == 50)
    row("pause, 4 harts", ms(value["rvmm", "pause_ns"]), "ms", "<= 1 ms", value["rvmm", "pause_ns"] <= 1e6)
    row("resume, 4 harts", ms(value["rvmm", "resume_ns"]), "ms", "<= 1 ms", value["rvmm", "resume_ns"] <= 1e6)
    plain = value["rvmm", "write_plain_ms"]
    share = ratio(value["rvmm", "write_tracked_ms"], plain)
    row("a guest that writes all the time", plain, "ms", "", 0)
    row("while writes are tracked", share, "x", "<= 1.10 x", share <= 1.1)
    share = ratio(value["rvmm", "write_after_ms"], plain)
    row("after that", share, "x", "<= 1.005 x", share <= 1.005)
}
