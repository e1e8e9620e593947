#compdef titan
# zsh completion for titan
_titan() {
    local -a found
    local line
    for line in "${(@f)$(_TITAN_COMPLETE=1 titan "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        [[ -n "$line" ]] && found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    if (( ${#found} )); then _describe titan found; else _files; fi
}
# the first completion runs this file as the function, later ones the function that it defines
if [[ "${funcstack[1]}" == "_titan" ]]; then _titan "$@"; else compdef _titan titan; fi
