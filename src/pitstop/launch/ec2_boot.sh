# What a machine of `pitstop launch ec2` does. launch/ec2.py writes the values above this line:
# ROOT MOUNT UNIT LAUNCH FILES WHEEL VOLUME FORMAT MAX_MINUTES, the environment, and steps().
#
# cloud-init runs it once, as root: it installs pitstop, and itself as a service. systemd then runs
# `boot run` for each start, and `boot ended` after each. Poweroff ends the machine for good: it was
# launched with InstanceInitiatedShutdownBehavior=terminate.
set -euo pipefail
shopt -s inherit_errexit

say() {
    echo "pitstop-launch: $*" >&2
}

install_all() {
    trap 'give_up $?' EXIT
    if [[ -n $MAX_MINUTES ]]; then
        shutdown -P "+$MAX_MINUTES" "pitstop: the longest time of this launch is over"
    fi
    mkdir -p "$ROOT"
    install -m 700 "$0" "$ROOT/boot"
    find_python
    PATH="$ROOT/bin:$PATH"
    command -v aws > /dev/null || timeout 20m python -m pip install --quiet awscli
    timeout 20m aws s3 cp --recursive --only-show-errors "$FILES" "$ROOT/files"
    timeout 30m python -m pip install --quiet "$ROOT/files/$WHEEL"
    aws s3 rm --recursive --only-show-errors "$FILES" || say "$FILES stays: no right to delete it"
    write_unit > "$UNIT"
    systemctl daemon-reload
    systemctl enable --now --no-block pitstop.service
    say "installed $WHEEL"
}

give_up() {
    if (($1 != 0)); then
        say "the installation failed with exit code $1: see cloud-init's lines above; this machine ends"
        systemctl poweroff
    fi
}

# A Deep Learning AMI has its Python, with torch, in /opt/pytorch.
find_python() {
    local python
    for python in /opt/pytorch/bin/python python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            if [[ $python != /opt/* ]]; then
                "$python" -m venv "$ROOT/venv"
                python=$ROOT/venv/bin/python
            fi
            ln -sfn "${python%/*}" "$ROOT/bin"
            return
        fi
    done
    say "there is no Python of 3.11 or newer here: give another --ami"
    return 2
}

# 150 s are more than a spot machine has from its notice to its end, so that nothing starts again
# there. A start that fails at once does so 5 times; slow ones end by --max-fruitless-starts.
write_unit() {
    cat << UNIT
[Unit]
Description=pitstop launch $LAUNCH
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=1h
StartLimitBurst=5
StartLimitAction=poweroff

[Service]
ExecStart=/bin/bash $ROOT/boot run
ExecStopPost=/bin/bash $ROOT/boot ended
Restart=on-failure
RestartPreventExitStatus=2 76 77
RestartSec=150
KillMode=mixed
TimeoutStopSec=110
LimitNOFILE=1048576
StandardOutput=journal+console
StandardError=inherit

[Install]
WantedBy=multi-user.target
UNIT
}

run() {
    PATH="$ROOT/bin:$PATH"
    local scratch
    scratch=$(fast_disk)
    mkdir -p "$scratch"
    ln -sfn "$scratch" "$ROOT/scratch"
    mount_volume
    cd "$ROOT"
    steps
}

# The machine's own NVMe disks, all as one; without any, its root disk. A Deep Learning AMI has
# them mounted. Disks that something else has taken are left alone.
fast_disk() {
    local here=$ROOT/nvme device disks
    if mountpoint -q /opt/dlami/nvme; then
        echo /opt/dlami/nvme/pitstop
        return
    fi
    if mountpoint -q "$here"; then
        echo "$here"
        return
    fi
    mapfile -t disks < <(lsblk -dnpo NAME,MODEL | awk '/EC2 NVMe Instance Storage/ {print $1}')
    if ((${#disks[@]} == 0)) || [[ -n $(lsblk -nro FSTYPE,MOUNTPOINT "${disks[@]}" | tr -d ' \n') ]]; then
        echo "$ROOT/disk"
        return
    fi
    device=${disks[0]}
    if ((${#disks[@]} > 1)); then
        device=/dev/md/pitstop
        mdadm --create "$device" --quiet --run --level 0 --raid-devices "${#disks[@]}" "${disks[@]}" >&2
    fi
    mkfs.ext4 -q -m 0 -E nodiscard "$device" >&2
    mkdir -p "$here"
    mount -o noatime "$device" "$here"
    echo "$here"
}

mount_volume() {
    local device system
    if [[ -z $VOLUME ]] || mountpoint -q "$MOUNT"; then
        return
    fi
    device=$(volume_device)
    udevadm settle
    if [[ -n $FORMAT ]] && ! blkid -p "$device" > /dev/null; then
        mkfs.ext4 -q -m 0 -L pitstop "$device"
        udevadm settle
    fi
    system=$(lsblk -nrpo NAME,FSTYPE "$device" | awk 'NF > 1 {print $1; exit}')
    if [[ -z $system ]]; then
        say "volume $VOLUME holds no file system: pack onto a new one with --prepare"
        exit 2
    fi
    mkdir -p "$MOUNT"
    mount -o noatime "$system" "$MOUNT"
}

# Names of NVMe devices change from boot to boot: the serial number is the volume's id. On machines
# without NVMe (p3) it has the name under which it was attached.
volume_device() {
    local device
    for _ in $(seq 150); do
        device=$(lsblk -dnpo NAME,SERIAL | awk -v serial="${VOLUME/-/}" '$2 == serial {print $1}')
        device=${device:-$(lsblk -dnpo NAME | grep -x /dev/xvdf || true)}
        if [[ -n $device ]]; then
            echo "$device"
            return
        fi
        sleep 2
    done
    say "volume $VOLUME was not attached within 5 minutes"
    return 1
}

# systemd tells how it ended: EXIT_CODE is `exited`, or how it was killed.
ended() {
    say "exit code $EXIT_STATUS"
    case $EXIT_CODE:$EXIT_STATUS in
        exited:0 | exited:2 | exited:76 | exited:77) systemctl poweroff ;;
    esac
}

case ${1:-} in
    run) run ;;
    ended) ended ;;
    *) install_all ;;
esac
