# Makes the table of scripts/bench state from "result VMM ROW NUMBER" lines: text on standard output.

function ms(vmm, row,    v) { v = value[vmm, row]; return v ~ /^[0-9]+$/ ? sprintf("%.2f", v / 1e6) : v }

# A line: text, figure, unit, and the target with whether it is met.
function line(title, figure, unit, target, met) {
    printf "%-64s %10s %-4s %s\n", title, figure == "" ? "-" : figure, unit, target == "" ? "" : target ": " (figure == "" ? "not measured" : met ? "met" : "missed")
}

function time(title, vmm, row, most) {
    line(title, ms(vmm, row), "ms", most == "" ? "" : "<= " most " ms", value[vmm, row] <= most * 1e6)
}

# The quotient of two figures.
function share(title, vmm, row, peer, of, most,    mine, theirs, x) {
    mine = value[vmm, row]; theirs = value[peer, of]
    if (mine ~ /^[0-9]+$/ && theirs > 0) x = sprintf("%.4f", mine / theirs)
    line("  " title, x, "x", most == "" ? "" : "<= " most, x <= most + 0)
}

{ sub(/\r$/, "") }
$1 == "result" && NF == 4 { value[$2, $3] = $4 }

END {
    time("restore, 512 MiB: exec to the first instruction", "rvmm", "restore_512M_entry_ns", 10)
    time("restore, 2 GiB: the same", "rvmm", "restore_2G_entry_ns", 10)
    time("QEMU -incoming file:, 512 MiB: the same", "qemu", "restore_512M_entry_ns")
    share("rvmm of QEMU", "rvmm", "restore_512M_entry_ns", "qemu", "restore_512M_entry_ns", 0.1)

    time("boot: exec to an answer of the shell", "rvmm", "boot_answer_ns")
    time("restore, 512 MiB: exec to an answer of the shell", "rvmm", "restore_512M_answer_ns")
    share("restore of boot", "rvmm", "restore_512M_answer_ns", "rvmm", "boot_answer_ns", 0.05)
    time("restore, 2 GiB: the same", "rvmm", "restore_2G_answer_ns")
    time("QEMU, boot: the same", "qemu", "boot_answer_ns")
    time("QEMU -incoming file:, 512 MiB: the same", "qemu", "restore_512M_answer_ns")

    saved = value["rvmm", "saved_bytes"]
    line("save: memory in use", saved == "" ? "" : sprintf("%.1f", saved / 1048576), "MiB")
    time("save", "rvmm", "save_ns")
    time("dd of as many bytes", "dd", "save_ns")
    share("save of dd", "rvmm", "save_ns", "dd", "save_ns", 1.3)
    time("save --live", "rvmm", "save_live_ns")
    time("save --live: the guest stands still", "rvmm", "save_live_paused_ns")

    time("migration of an idle guest of 512 MiB: it stands still", "rvmm", "migration_downtime_ns", 30)
    share("bytes sent of those in use", "rvmm", "migration_sent", "rvmm", "migration_used", 1.1)

    line("clones of 50 that answer", value["rvmm", "clones_answer"], "", "50", value["rvmm", "clones_answer"] == 50)
    line("memory that each idle clone but the first adds", value["rvmm", "clone_idle_kb"], "KiB", "<= 4096 KiB", value["rvmm", "clone_idle_kb"] <= 4096)
    line("the same after each has answered", value["rvmm", "clone_answered_kb"], "KiB")

    for (i = 1; i <= split("idle busy", states, " "); i++)
        for (k = 1; k <= split("pause resume", orders, " "); k++) {
            row = orders[k] "_" states[i]
            time(orders[k] ", 4 " states[i] " harts, longest of 3", "rvmm", row "_ns", 1)
            time("  shortest", "rvmm", row "_least_ns")
        }

    time("a guest that writes 16 MiB again and again", "rvmm", "write_plain_ns")
    share("once more", "rvmm", "write_plain_again_ns", "rvmm", "write_plain_ns")
    share("while its writes are tracked", "rvmm", "write_tracked_ns", "rvmm", "write_plain_ns", 1.1)
    share("once more", "rvmm", "write_tracked_again_ns", "rvmm", "write_plain_ns")
    # A tick of the scheduler more or less is 0.4 %.
    share("afterwards", "rvmm", "write_after_ns", "rvmm", "write_plain_ns", 1.01)
    share("once more", "rvmm", "write_after_again_ns", "rvmm", "write_plain_ns", 1.01)
}
