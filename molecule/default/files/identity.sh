# Runs in a container as its user, in any POSIX shell: what that user finds there, a "key=value" a line.
shell=$(awk -F: -v uid="$(id -u)" '$3 == uid { print $7 }' /etc/passwd)
touch /workspace/written-inside "$HOME/written-inside"
echo "ids=$(id -u):$(id -g)"
echo "name=$(id -un)"
echo "home=$HOME"
echo "home owner=$(stat -c %u:%g "$HOME")"
echo "workspace owner=$(stat -c %u:%g /workspace)"
echo "directory=$PWD"
echo "shell=$shell"
echo "prompt=$("$shell" -ic 'echo "$PS1"' 2>/dev/null | tail -n 1)"
echo "alias=$("$shell" -ic 'alias ws' 2>/dev/null | tail -n 1)"
echo "stack=$(ulimit -s)"
echo "terminal=$(readlink /proc/1/fd/0)"
