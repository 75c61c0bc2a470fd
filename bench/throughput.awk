# Prints the medians of repeated "result VMM ROW NUMBER" lines, and their ratios to QEMU's: text on standard output.
# A row is met if rvmm's ratio to its peer reaches the target.

function median(list,    n, part, i, j, swap) {
    n = split(list, part, " ")
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && part[j] + 0 < part[j - 1] + 0; j--) {
            swap = part[j]; part[j] = part[j - 1]; part[j - 1] = swap
        }
    return n == 0 ? "" : n % 2 ? part[(n + 1) / 2] : (part[n / 2] + part[n / 2 + 1]) / 2
}

function against(row, own, peer, least,    mine, theirs) {
    mine = median(all[own, row]); theirs = median(all[peer, row])
    if (mine == "" || theirs == "" || theirs == 0) return "-"
    return sprintf("%.2f (>= %.2f: %s)", mine / theirs, least, mine / theirs >= least ? "met" : "missed")
}

function line(title, row, unit, is_net) {
    printf "%-30s %-9s %9.1f %9s %9.1f %9s   %s", title, unit, median(all["rvmm", row]) / 1000, \
        is_net ? sprintf("%.1f", median(all["rvmm-vhost", row]) / 1000) : "", median(all["qemu", row]) / 1000, \
        is_net ? sprintf("%.1f", median(all["qemu-vhost", row]) / 1000) : "", against(row, "rvmm", "qemu", 1.15)
    if (is_net) printf ", %s", against(row, "rvmm-vhost", "qemu-vhost", 1)
    printf "\n"
}

{ sub(/\r$/, "") }
$1 == "result" && NF == 4 { all[$2, $3] = all[$2, $3] " " $4 }

END {
    printf "%-30s %-9s %9s %9s %9s %9s   %s\n", "wall-clock time, 2 CPUs", "", "rvmm", "vhost", "qemu", "vhost", \
        "rvmm / qemu, both with vhost"
    line("fio 4 KiB random read, qd 32", "randread_iops", "k/s", 0)
    line("iperf3 guest to host", "net_out_kbps", "Mbit/s", 1)
    line("iperf3 host to guest", "net_in_kbps", "Mbit/s", 1)
}
