# Medians of "result VMM WHAT NUMBER" lines, several of a kind, and what they are of QEMU's: text on standard output.
# A row is met where rvmm has as much more than its peer as is asked for.

function median(list,    n, part, i, j, swap) {
    n = split(list, part, " ")
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && part[j] + 0 < part[j - 1] + 0; j--) {
            swap = part[j]; part[j] = part[j - 1]; part[j - 1] = swap
        }
    return n == 0 ? "" : n % 2 ? part[(n + 1) / 2] : (part[n / 2] + part[n / 2 + 1]) / 2
}

function against(row, peer, least,    mine, theirs) {
    mine = median(all["rvmm", row]); theirs = median(all[peer, row])
    if (mine == "" || theirs == "" || theirs == 0) return "-"
    return sprintf("%.2f (>= %.2f: %s)", mine / theirs, least, mine / theirs >= least ? "met" : "missed")
}

function line(title, row, by, unit, least_vhost) {
    printf "%-30s %-9s %9.1f %9.1f %9.1f   %s", title, unit, median(all["rvmm", row]) / by, median(all["qemu", row]) / by, \
        median(all["qemu-vhost", row]) / by, against(row, "qemu", 1.15)
    if (least_vhost) printf ", %s", against(row, "qemu-vhost", least_vhost)
    printf "\n"
}

{ sub(/\r$/, "") }
$1 == "result" && NF == 4 { all[$2, $3] = all[$2, $3] " " $4 }

END {
    printf "%-30s %-9s %9s %9s %9s   %s\n", "against the clock, 2 CPUs", "", "rvmm", "qemu", "vhost", "rvmm of qemu, of qemu with vhost"
    line("fio 4 KiB random read, qd 32", "randread_iops", 1000, "k/s", 0)
    line("iperf3 guest to host", "net_out_kbps", 1000, "Mbit/s", 1)
    line("iperf3 host to guest", "net_in_kbps", 1000, "Mbit/s", 1)
}
