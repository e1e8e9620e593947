# fish completion for titan
function __titan_complete
    set -lx _TITAN_COMPLETE 1
    set -l words (commandline -opc)
    titan $words[2..] (commandline -ct) 2>/dev/null
end
complete -c titan -a '(__titan_complete)'
